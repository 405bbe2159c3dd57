# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from dmole.models.prompts import IGNORE, Encoded, encode, instruction_ids, stop_ids

from .batches_and_samples import BATCHES, check_batch, widened
from .conversations import LATER, NONE, ONE, TALK, TWO, Declared, picture, user
from .folders import END_OF_TURN, FAMILIES, write_folder


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(family, tmp_path_factory.mktemp(family))


@pytest.fixture
def processor(folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return widened(AutoModelForImageTextToText.from_pretrained(folder)).eval()


def rows(encoded: Encoded) -> Iterator[tuple[list[int], list[int]]]:
    """Each sample's ids and labels without padding."""
    assert encoded.labels is not None
    for ids, mask, labels in zip(
        encoded.inputs["input_ids"], encoded.inputs["attention_mask"], encoded.labels, strict=True
    ):
        assert (labels[mask == 0] == IGNORE).all()
        yield ids[mask == 1].tolist(), labels[mask == 1].tolist()


def answers(processor: Any, encoded: Encoded) -> list[str]:
    return [
        "".join(processor.tokenizer.decode([n for n in labels if n != IGNORE]).split()) for _, labels in rows(encoded)
    ]


@pytest.mark.parametrize("batch", BATCHES)
def test_labels_are_the_answer_and_the_end_of_turn(processor: Any, family: str, batch: str) -> None:
    encoded = encode(processor, BATCHES[batch], with_answers=True, declaration=Declared())
    expected = ["".join(row[-1]["content"][0]["text"].split()) + END_OF_TURN[family] for row in BATCHES[batch]]
    assert answers(processor, encoded) == expected
    assert all(labels[-1] != IGNORE or family in ("idefics3", "gemma3") for _, labels in rows(encoded))
    assert encoded.images == tuple(
        sum(p["type"] == "image" for m in row for p in m["content"]) for row in BATCHES[batch]
    )


@pytest.mark.parametrize("conversation", [ONE, TWO, NONE], ids=["one", "two", "none"])
def test_labels_follow_the_ids_of_the_prompt(processor: Any, conversation: Any) -> None:
    asked = encode(processor, [conversation], with_answers=False, declaration=Declared())
    whole = encode(processor, [conversation], with_answers=True, declaration=Declared())
    prompt = asked.inputs["input_ids"][0].tolist()
    ((ids, labels),) = rows(whole)
    assert asked.labels is None
    assert ids[: len(prompt)] == prompt
    assert [label == IGNORE for label in labels[: len(prompt) + 1]] == [True] * len(prompt) + [False]
    assert asked.prompt_lengths == whole.prompt_lengths == (len(prompt),)


@pytest.mark.parametrize("conversation", [LATER, TALK], ids=["image_in_second_turn", "text"])
def test_every_assistant_turn_is_labelled(processor: Any, family: str, conversation: Any) -> None:
    encoded = encode(processor, [NONE, conversation], with_answers=True, declaration=Declared())
    texts = [message["content"][0]["text"] for message in conversation[1::2]]
    end = END_OF_TURN[family]
    first = texts[0] + ("" if family.startswith("llava") else end)
    assert answers(processor, encoded)[1] == "".join((first + texts[1] + end).split())
    # The labels are the input's own ids, in place.
    ids, labels = list(rows(encoded))[1]
    assert all(label in (IGNORE, number) for number, label in zip(ids, labels, strict=True))


@pytest.mark.parametrize("with_answers", [True, False], ids=["training", "generation"])
@pytest.mark.parametrize("batch", ["images", "mixed", "text_first"])
def test_a_batch_equals_its_samples_alone(processor: Any, model: Any, batch: str, with_answers: bool) -> None:
    check_batch(processor, model, batch, with_answers)


def test_another_image_gives_other_logits(processor: Any, model: Any) -> None:
    """Without this the tests of batches could not see images of the wrong sample."""
    first, second = (
        encode(processor, [[user("What is it?", image)]], with_answers=False, declaration=Declared()).inputs
        for image in (picture(16, 16, 5), picture(16, 16, 6))
    )
    with torch.no_grad():
        assert (model(**first).logits[0, -1] - model(**second).logits[0, -1]).abs().max() > 0.01


def test_generation_stops_where_the_answer_ended(processor: Any, model: Any, family: str) -> None:
    end = processor.tokenizer.convert_tokens_to_ids(END_OF_TURN[family])
    assert end in stop_ids(processor, model.generation_config, declaration=Declared())
    for own, expected in ((None, [end]), (end, [end]), ([0, end], [0, end])):
        assert stop_ids(processor, GenerationConfig(eos_token_id=own), declaration=Declared()) == expected


def test_padding_side_of_the_tokenizer_is_kept(processor: Any) -> None:
    for side in ("left", "right"):
        processor.tokenizer.padding_side = side
        for with_answers in (True, False):
            encode(processor, [ONE, NONE], with_answers=with_answers, declaration=Declared())
        assert processor.tokenizer.padding_side == side


def test_conversations_are_not_changed(processor: Any) -> None:
    conversation = [{"role": "user", "content": "Yes or no?"}, {"role": "assistant", "content": "yes"}]
    before = copy.deepcopy(conversation)
    encoded = encode(processor, [conversation], with_answers=True, declaration=Declared())
    assert conversation == before
    assert answers(processor, encoded)[0].startswith("yes")


@pytest.mark.parametrize("default", ["cpu", "meta"])
def test_tensors_are_on_the_cpu_whatever_the_default_device(processor: Any, default: str) -> None:
    torch.set_default_device(default)
    try:
        for with_answers in (True, False):
            encoded = encode(processor, [ONE, NONE, TWO], with_answers=with_answers, declaration=Declared())
            ids, mask = instruction_ids(processor, ["What is it?"])
            moved = encoded.to("meta", torch.bfloat16)
    finally:
        torch.set_default_device(None)
    assert {value.device.type for value in (*encoded.inputs.values(), ids, mask)} == {"cpu"}
    assert {value.device.type for value in moved.inputs.values()} == {"meta"}
    assert moved.inputs["pixel_values"].dtype == torch.bfloat16
    assert moved.inputs["input_ids"].dtype == torch.int64


def test_two_calls_of_the_processor_give_the_same_labels(processor: Any, family: str) -> None:
    """The prefix rule as it is defined, on expanded ids: prompt and conversation each by the processor."""
    for conversation in (ONE, TWO, NONE):
        prompt = processor.apply_chat_template(
            [conversation[:-1]], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )["input_ids"][0].tolist()
        whole = processor.apply_chat_template([conversation], tokenize=True, return_dict=True, return_tensors="pt")
        ids = whole["input_ids"][0].tolist()
        ((found, labels),) = rows(encode(processor, [conversation], with_answers=True, declaration=Declared()))
        assert ids[: len(prompt)] == prompt
        taught = [label for label in labels if label != IGNORE]
        rest = ids[len(prompt) :]
        # What the template writes after the answer is not taught; an end of turn that it does not write is.
        assert taught[:-1] == rest[: len(taught) - 1]
        assert processor.tokenizer.decode(taught[-1]) == END_OF_TURN[family]
        assert processor.tokenizer.decode(rest[len(taught) - 1 :]).strip() in ("", END_OF_TURN[family])
        assert found[: len(prompt)] == prompt


@pytest.mark.parametrize("conversation", [ONE, TWO, NONE, TALK, LATER], ids=["one", "two", "none", "talk", "later"])
def test_assistant_masks_give_the_labels_of_the_prefix_rule(processor: Any, family: str, conversation: Any) -> None:
    if family.startswith("llava"):
        # The published block holds the space after the answer, which a token shares with the next turn.
        processor.chat_template = processor.chat_template.replace(
            "{{ content['text'] + ' ' }}{% endgeneration %}", "{{ content['text'] }}{% endgeneration %}{{ ' ' }}"
        )
    blocks = {
        "idefics3": ("{{ line['text'] }}", "{{ line['text'] }}"),
        "gemma3": ("{{ item['text'] | trim }}", "{{ item['text'] | trim }}"),
    }
    if family in blocks:
        template = processor.chat_template
        end = END_OF_TURN[family]
        text, written = blocks[family]
        marked = "{% generation %}" + written + end + "{% endgeneration %}"
        processor.chat_template = template.replace(
            text, "{% if message['role'] == 'assistant' %}" + marked + "{% else %}" + written + "{% endif %}"
        )
        template = processor.chat_template
        for old in ("{% endfor %}<end_of_utterance>\n", "{% endfor %}{{ '<end_of_turn>\n' }}"):
            template = template.replace(
                old,
                "{% endfor %}{% if message['role'] != 'assistant' %}" + end + "{% endif %}{{ '\n' }}",
            )
        processor.chat_template = template
    by_mask = encode(processor, [conversation], with_answers=True, declaration=Declared(labels="assistant_mask"))
    by_prefix = encode(processor, [conversation], with_answers=True, declaration=Declared())
    assert answers(processor, by_mask) == answers(processor, by_prefix)
    assert by_mask.inputs.keys() == by_prefix.inputs.keys()


def test_generation_blocks_that_mark_more_than_the_answers_are_refused(processor: Any, family: str) -> None:
    if family == "llava":
        found = r"labels: got generation blocks around \['yes USER:', 'blue</s>'\]; expected them around the answers"
    elif family == "llava_next":
        processor.chat_template = processor.chat_template.replace(
            "{{ content['text'] + ' ' }}{% endif %}",
            "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endif %}",
        )
        found = "labels: got generation blocks around"
    elif family == "paddleocr_vl":
        processor.chat_template = processor.chat_template.replace(
            "content['text'] + eos_token }}{% endgeneration %}", "content['text'] }}{% endgeneration %}{{ eos_token }}"
        )
        found = "labels: got generation block 1 without '</s>' at its end"
    else:
        found = "labels: got assistant_mask and a chat template without a generation block"
    with pytest.raises(ValueError, match=found):
        encode(processor, [TALK], with_answers=True, declaration=Declared(labels="assistant_mask"))


def test_instruction_ids_are_the_words_as_the_prompt_has_them(processor: Any) -> None:
    texts = ["What is it?", "Describe the image in one sentence.", "  A B "]
    ids, mask = instruction_ids(processor, texts)
    assert ids.dtype == mask.dtype == torch.int64 and mask[:, 0].all()
    for s, text in enumerate(texts):
        kept = ids[s, mask[s] == 1].tolist()
        assert processor.tokenizer.decode(kept).strip() == text.strip()
        assert not {*kept} & {*processor.tokenizer.all_special_ids}
        prompt = encode(processor, [[user(text)]], with_answers=False, declaration=Declared()).inputs["input_ids"][0]
        places = [prompt[i : i + len(kept)].tolist() == kept for i in range(len(prompt))]
        assert any(places)


def test_empty_instruction_is_refused(processor: Any) -> None:
    with pytest.raises(ValueError, match=r"instruction: got a text without a token \('  '\)"):
        instruction_ids(processor, ["What is it?", "  "])
