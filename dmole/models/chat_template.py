# SPDX-License-Identifier: Apache-2.0
"""The chat template of a processor: what it writes around a conversation, checked once before anything is trained.

A template that writes no special token after an answer (LLaVA 1.5) gets the tokenizer's `eos_token` right after the
last one: a model trained without it would never stop.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedTokenizerBase, ProcessorMixin

Message = Mapping[str, Any]
Conversation = Sequence[Message]

# "<|im_start|>", "<user>": text that stands for one token wherever a tokenizer has it. Llama 2's "[INST]" and "<<SYS>>"
# are plain text in the checkpoints that use them.
MARKER = re.compile(r"(?<!<)<\|?[A-Za-z_/][^<>\s]*>")
PROBE = "xyzzy"  # a text that no template writes itself


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A processor's template, checked once.

    Attributes:
        source: the Jinja source as the processor has it.
        text: the source that is used: with the end of turn appended where `source` writes none (`appended`).
        end: the token that ends an answer, and `end_id`, its id. Generation has to stop at it.
        control: matches a token that only the template may write: special tokens and image placeholders.
        generation: whether the source marks the answers with a generation block.
    """

    source: str
    text: str
    appended: bool
    end: str
    end_id: int
    control: re.Pattern[str]
    generation: bool

    def render(
        self, processor: ProcessorMixin, messages: Conversation, *, prompt: bool = False, published: bool = False
    ) -> str:
        """The conversation as text; `prompt` opens the assistant's next turn, `published` leaves out what we append."""
        return _render(processor, self.source if published else self.text, messages, prompt)


def chat_template(processor: ProcessorMixin, *, plain_markers: Sequence[str] = ()) -> ChatTemplate:
    """The template of the processor, or of its tokenizer where it has none, after every check that needs no data.

    Args:
        plain_markers: markers such as "<|user|>" that the model was trained to read as plain text.

    Raises:
        ValueError: no template; a token that the template or the processor writes and the tokenizer lacks; no token
            that ends an answer; no padding token.
    """
    source = _source(processor)
    tokenizer = tokenizer_of(processor)
    # Whatever may change the answer is part of the key.
    state = (len(tokenizer), *map(str, tokenizer.special_tokens_map.items()))
    return _checked(processor, source, tuple(plain_markers), state)


def check_texts(template: ChatTemplate, messages: Conversation) -> None:
    """Raise ValueError for a token in a text that only the template may write, such as "<image>" or "</s>"."""
    for message in messages:
        for part in message["content"]:
            if part["type"] == "text" and (found := template.control.search(part["text"])):
                raise ValueError(
                    f"text: got the model's special token {found[0]!r} in the {message['role']}'s text; expected plain "
                    f"text. Remove it: the chat template writes these tokens itself."
                )


def tokens(processor: ProcessorMixin, text: str) -> list[int]:
    """The ids of rendered text: the template has written the special tokens already."""
    return cast(list[int], tokenizer_of(processor).encode(text, add_special_tokens=False))


def tokenizer_of(processor: ProcessorMixin) -> PreTrainedTokenizerBase:
    return cast(PreTrainedTokenizerBase, cast(Any, processor).tokenizer)


def _source(processor: ProcessorMixin) -> str:
    if getattr(processor, "tokenizer", None) is None:
        raise ValueError(
            f"processor: got {type(processor).__name__} without a tokenizer; expected one that reads text and images. "
            f"Load it with AutoProcessor.from_pretrained."
        )
    found = getattr(processor, "chat_template", None) or getattr(tokenizer_of(processor), "chat_template", None)
    if isinstance(found, dict):
        found = found.get("default")
    if not found:
        raise ValueError(
            "chat_template: got none; expected the template by which the model was trained. Put chat_template.jinja "
            "into the model's folder, or set processor.chat_template and save the processor."
        )
    return cast(str, found)


def _render(processor: ProcessorMixin, source: str, messages: Conversation, prompt: bool) -> str:
    rendered = cast(Any, processor).apply_chat_template(
        [dict(message) for message in messages], chat_template=source, add_generation_prompt=prompt, tokenize=False
    )
    return cast(str, rendered)


@functools.lru_cache(maxsize=16)
def _checked(processor: ProcessorMixin, source: str, plain: tuple[str, ...], _state: tuple[Any, ...]) -> ChatTemplate:
    tokenizer = tokenizer_of(processor)
    if tokenizer.pad_token is None:
        raise ValueError(
            "tokenizer.pad_token: got none; expected the token that fills short rows of a batch. Set it and save the "
            "processor: an unused token, or the end token."
        )
    _check_placeholders(processor)
    asked = [{"role": "user", "content": [{"type": "text", "text": PROBE}]}]
    answered = [*asked, {"role": "assistant", "content": [{"type": "text", "text": PROBE}]}]
    for text in (_render(processor, source, asked, True), _render(processor, source, answered, False)):
        _check_known(processor, text, plain)
    special = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    *_, after = _render(processor, source, answered, False).split(PROBE)
    ends = [number for number in tokens(processor, after) if number in special]
    generation = re.search(r"{%[-+]?\s*generation\s*[-+]?%}", source) is not None
    used = source
    if not ends:
        if tokenizer.eos_token is None:
            raise ValueError(
                "tokenizer.eos_token: got none, and the chat template writes no token after an answer; expected one "
                "of both, since nothing else tells the model to stop. Set tokenizer.eos_token and save the processor."
            )
        used = _ended(source, tokenizer.eos_token)
        for messages, prompt, end in ((asked, True, None), (answered, False, tokenizer.eos_token)):
            text = _render(processor, source, messages, prompt)
            assert _render(processor, used, messages, prompt) == (text if end is None else text.rstrip() + end)
    end_id = ends[0] if ends else cast(int, tokenizer.eos_token_id)
    written = {str(token) for token in tokenizer.added_tokens_decoder.values() if str(token) in source}
    placed = {value for name, value in vars(processor).items() if name.endswith("_token") and isinstance(value, str)}
    control = sorted({token for token in (*special.values(), *written, *placed) if token.strip()}, key=len)
    return ChatTemplate(
        source=source,
        text=used,
        appended=not ends,
        end=cast(str, tokenizer.convert_ids_to_tokens(end_id)),
        end_id=end_id,
        # The longest first, so that the message names all of it.
        control=re.compile("|".join(map(re.escape, reversed(control)))),
        generation=generation,
    )


def _ended(source: str, end: str) -> str:
    """The template with `end` right after the last answer: a space there would be one more token to learn."""
    # Jinja drops one line feed at the end of a source, and one after a block.
    inner = "{{ '' }}" + source.removesuffix("\n")
    return (
        f"{{% set whole_text %}}{inner}{{% endset %}}{{% if add_generation_prompt %}}{{{{ whole_text }}}}{{% else %}}"
        f"{{{{ whole_text.rstrip() + {end!r} }}}}{{% endif %}}"
    )


def _check_placeholders(processor: ProcessorMixin) -> None:
    """The tokens that the processor itself writes: image placeholders and what it puts around them."""
    for name, value in vars(processor).items():
        if isinstance(value, str) and name.endswith(("_token", "_tag")) and not _is_token(processor, value):
            raise ValueError(
                f"tokenizer: got no token {value!r}, which {type(processor).__name__} writes as its {name}; expected "
                f"the tokenizer that the model was trained with. Take tokenizer.json from the model's own folder."
            )


def _check_known(processor: ProcessorMixin, text: str, plain: Sequence[str]) -> None:
    """No marker of the template falls into pieces, and nothing of it is unknown."""
    tokenizer = tokenizer_of(processor)
    for marker in MARKER.findall(text):
        if marker not in plain and not _is_token(processor, marker):
            raise ValueError(
                f"tokenizer: got no token {marker!r}, which the chat template writes; expected every marker of the "
                f"template to be a token. Take tokenizer.json from the model's own folder, or add {marker!r} to "
                f"declaration.plain_markers if the model was trained to read it as text."
            )
    unknown = tokenizer.unk_token_id
    own = text.count(PROBE) * tokens(processor, PROBE).count(unknown) if unknown is not None else 0
    if unknown is not None and tokens(processor, text).count(unknown) > own:
        raise ValueError(
            f"tokenizer: got {tokenizer.unk_token!r} for a part of the chat template's text {text!r}; expected a token "
            f"for each part. Take tokenizer.json from the model's own folder."
        )


def _is_token(processor: ProcessorMixin, text: str) -> bool:
    tokenizer = tokenizer_of(processor)
    number = tokenizer.convert_tokens_to_ids(text)
    if number is None or (number == tokenizer.unk_token_id and text != tokenizer.unk_token):
        return False
    return number in tokens(processor, text)
