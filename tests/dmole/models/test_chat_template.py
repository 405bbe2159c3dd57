# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dmole.models.chat_template import chat_template
from dmole.models.prompts import IGNORE, encode, instruction_ids

from .conversations import NONE, ONE, TALK, Declared, assistant, picture, user
from .folders import END_OF_TURN, FAMILIES, SQUARE, tokenizer, write_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_folder(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture
def llava(folders: dict[str, Path]) -> Any:
    return AutoProcessor.from_pretrained(folders["llava"])


def trained(processor: Any, conversation: Any = NONE, **declared: Any) -> torch.Tensor:
    encoded = encode(processor, [conversation], with_answers=True, declaration=Declared(**declared))
    assert encoded.labels is not None
    return encoded.labels


def llava_with(words: Any, template: str) -> Any:
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE)
    return LlavaProcessor(image_processor=image_processor, tokenizer=words, patch_size=4, chat_template=template)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_turn_is_the_one_of_the_template(folders: dict[str, Path], family: str) -> None:
    processor = AutoProcessor.from_pretrained(folders[family])
    template = chat_template(processor)
    assert template.end == END_OF_TURN[family]
    assert template.end_id == processor.tokenizer.convert_tokens_to_ids(template.end)
    assert template.appended == family.startswith("llava")


@pytest.mark.parametrize(
    "source", ["{}\n", "\n{}", "{}{{% if true %}}\n\n{{% endif %}}\n"], ids=["after", "before", "blank"]
)
def test_an_appended_end_leaves_the_template_as_it_is(llava: Any, source: str) -> None:
    llava.chat_template = source.format(llava.chat_template)
    template = chat_template(llava)
    assert template.appended
    assert template.render(llava, ONE[:1], prompt=True) == llava.apply_chat_template(
        ONE[:1], add_generation_prompt=True
    )
    assert template.render(llava, ONE) == llava.apply_chat_template(ONE).rstrip() + "</s>"


def test_no_chat_template_is_refused(llava: Any) -> None:
    llava.chat_template = None
    assert (trained(llava) != IGNORE).any()  # the tokenizer's own template
    llava.tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"chat_template: got none; expected the template .* Put chat_template.jinja"):
        trained(llava)


MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("missing", ["<|im_start|>", "<|im_end|>"])
@pytest.mark.parametrize("words", [True, False], ids=["pieces_or_unk", "bytes"])
def test_a_marker_that_the_tokenizer_lacks_is_refused(words: bool, missing: str) -> None:
    special = [token for token in ("<image>", "<|im_start|>", "<|im_end|>") if token != missing]
    processor = llava_with(tokenizer(special, words=words, eos_token="</s>"), MARKED)
    with pytest.raises(ValueError) as raised:
        trained(processor)
    assert str(raised.value) == (
        f"tokenizer: got no token {missing!r}, which the chat template writes; expected every marker of the template "
        f"to be a token. Take tokenizer.json from the model's own folder, or add {missing!r} to "
        f"declaration.plain_markers if the model was trained to read it as text."
    )
    whole = llava_with(tokenizer(["<image>", "<|im_start|>", "<|im_end|>"], words=words, eos_token="</s>"), MARKED)
    assert (trained(whole) != IGNORE).any()


def test_a_declared_marker_is_plain_text() -> None:
    processor = llava_with(tokenizer(["<image>", "<|im_end|>"], eos_token="</s>"), MARKED)
    labels = trained(processor, plain_markers=("<|im_start|>",))
    assert processor.tokenizer.decode(labels[labels != IGNORE]) == "A B C<|im_end|>"
    ids, _ = instruction_ids(processor, ["What?"], declaration=Declared(plain_markers=("<|im_start|>",)))
    assert processor.tokenizer.decode(ids[0]) == "What?"


def test_text_of_the_template_that_becomes_unk_is_refused() -> None:
    """As a converted LLaVA had it: four special tokens of its prompt were `<unk>`, and it trained without a word."""
    template = MARKED.replace("<|im_start|>", "§ ").replace("<|im_end|>", "</s>")
    with pytest.raises(ValueError, match=r"tokenizer: got '<unk>' for a part of the chat template's text '§ user"):
        trained(llava_with(tokenizer(["<image>"], words=True, eos_token="</s>"), template))
    # In a user's text it is no fault of the template.
    plain = llava_with(tokenizer(["<image>"], words=True, eos_token="</s>"), template.replace("§", "user"))
    assert (trained(plain, [user("What is § ?"), assistant("A")]) != IGNORE).any()


def test_an_image_token_that_the_tokenizer_lacks_is_refused() -> None:
    words = tokenizer(["<|im_start|>", "<|im_end|>"], words=True, eos_token="</s>")
    with pytest.raises(ValueError, match="tokenizer: got no token '<image>', which LlavaProcessor writes as its image"):
        trained(llava_with(words, MARKED))


def test_no_end_of_turn_is_refused(llava: Any) -> None:
    llava.tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"tokenizer.eos_token: got none, and the chat template writes no token after"):
        trained(llava)


def test_no_padding_token_is_refused(llava: Any) -> None:
    llava.tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"tokenizer.pad_token: got none; expected the token that fills short rows"):
        trained(llava)


def test_a_prompt_that_is_no_prefix_is_refused_with_the_remedy_that_works() -> None:
    """ "Assistant: " and "Assistant: yes" do not share their tokens where a word holds the space before it."""
    template = (
        "{% for message in messages %}{{ message['role'] + ': ' }}{% for part in message['content'] %}"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ part['text'] + eos_token }}{% endgeneration %}"
        "{% else %}{{ part['text'] + '\n' }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    processor = llava_with(tokenizer(["<image>"], eos_token="</s>"), template)
    conversation = [user("A or B?"), assistant("yes")]
    with pytest.raises(ValueError, match="is no prefix of the conversation .*Set declaration.labels to assistant_mask"):
        trained(processor, conversation)
    labels = trained(processor, conversation, labels="assistant_mask")
    assert processor.tokenizer.decode(labels[labels != IGNORE]).strip() == "yes</s>"


def test_a_template_that_leaves_a_text_out_is_refused(llava: Any) -> None:
    llava.chat_template = (
        "{% for message in messages if message['role'] != 'system' %}" + llava.chat_template.split("%}", 1)[1]
    )
    silent = [{"role": "system", "content": "Be brief."}, *NONE]
    with pytest.raises(ValueError, match=r"leaves out the system's text 'Be brief\.'"):
        trained(llava, silent)


@pytest.mark.parametrize("text", ["What is in <image> ?", "a</s>"])
@pytest.mark.parametrize("with_answers", [True, False], ids=["training", "generation"])
def test_a_special_token_in_a_text_is_refused(llava: Any, text: str, with_answers: bool) -> None:
    token = "<image>" if "<image>" in text else "</s>"
    with pytest.raises(ValueError, match=f"text: got the model's special token '{token}' in the user's text"):
        encode(llava, [[user(text), assistant("a")]], with_answers=with_answers, declaration=Declared())
    with pytest.raises(ValueError, match=f"text: got the model's special token '{token}' in the assistant's text"):
        trained(llava, [user("What?"), assistant(text)])


def test_malformed_conversations_are_refused(llava: Any) -> None:
    cases: list[tuple[Any, str]] = [
        ([user("What?")], "conversation: got no answer at its end"),
        ([assistant("yes")], "conversation: got no question"),
        ([{"role": "user", "content": [{"type": "video", "video": 1}]}, assistant("a")], "content: got type 'video'"),
        ([{"role": "user", "content": [{"type": "image"}]}, assistant("a")], "content: got image without its data"),
    ]
    for conversation, text in cases:
        with pytest.raises(ValueError, match=text):
            trained(llava, conversation)
    with pytest.raises(ValueError, match="conversations: got none"):
        encode(llava, [], with_answers=True, declaration=Declared())


def test_a_changed_tokenizer_or_template_is_checked_anew(llava: Any) -> None:
    assert chat_template(llava).end == "</s>"
    llava.chat_template = MARKED
    with pytest.raises(ValueError, match=r"got no token '<\|im_start\|>'"):
        trained(llava, ONE)
    llava.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    labels = trained(llava, TALK)
    assert llava.tokenizer.decode(labels[labels != IGNORE]) == "yes<|im_end|>blue<|im_end|>"


def test_pictures_of_noise_differ() -> None:
    assert picture(8, 8, 0).tobytes() != picture(8, 8, 1).tobytes()
