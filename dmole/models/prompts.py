# SPDX-License-Identifier: Apache-2.0
"""Conversations -> the tensors that a model's forward takes, and the labels of their answers.

    training     prompt + answer, right-padded; labels are the answers' ids, -100 elsewhere
    generation   the prompt alone, left-padded; no labels

A conversation is transformers' list of messages, `{"role": "user", "content": [{"type": "image", "image": PIL image},
{"type": "text", "text": "..."}]}`. The processor makes every tensor, and all that it makes is passed on: models lose
images or compute another loss without `token_type_ids`, `image_sizes` and the like.

Shape letters: B samples, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import ProcessorMixin

from dmole.models.answers import Labels, expanded_spans
from dmole.models.batches import per_sample_inputs, processed_batch
from dmole.models.chat_template import PROBE, ChatTemplate, Conversation, chat_template
from dmole.models.row_text import row_text

IGNORE = -100  # cross-entropy's ignore_index
PARTS = ("image", "text")


class LabelRule(Protocol):
    """What of `dmole.models.declaration.Declaration` decides the labels."""

    @property
    def labels(self) -> Labels: ...


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A batch of B conversations.

    Attributes:
        inputs: everything that the processor returns; `input_ids` and `attention_mask` are int64 [B, L].
        labels: int64 [B, L], the answers' ids and -100 elsewhere; None where the batch is for generation.
        images: how many images each sample has.
        prompt_lengths: how many tokens come before each sample's last answer, padding not counted.
    """

    inputs: dict[str, Tensor]
    labels: Tensor | None
    images: tuple[int, ...]
    prompt_lengths: tuple[int, ...]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Encoded:
        """The same batch on a device; floating-point inputs in `dtype` where it is given."""
        moved = {
            name: value.to(device, dtype if value.is_floating_point() else None) for name, value in self.inputs.items()
        }
        return replace(self, inputs=moved, labels=None if self.labels is None else self.labels.to(device))


def encode(
    processor: ProcessorMixin, conversations: Sequence[Conversation], *, with_answers: bool, declaration: LabelRule
) -> Encoded:
    """One batch, on the CPU whatever torch's default device is; samples with and without images may be mixed.

    `with_answers`: the whole conversations, right-padded, every assistant turn labelled up to the token that ends it.
    Otherwise the conversations without a last assistant turn, opened for the assistant's answer and left-padded. The
    tokenizer's own `padding_side` is neither read nor changed.

    Raises:
        ValueError: what `dmole.models.chat_template.chat_template` refuses; a conversation without an answer where
            answers are asked for; a template whose prompt is no prefix of its conversation.
    """
    if not conversations:
        raise ValueError("conversations: got none; expected at least one. Drop the empty batch.")
    template = template_of(processor, declaration)
    rows = [normalised(messages, with_answers=with_answers) for messages in conversations]
    texts = [row_text(processor, template, row, declaration.labels if with_answers else None) for row in rows]
    images = tuple(image_count(row) for row in rows)
    inputs = processed_batch(
        lambda some: _process(processor, template, some, prompt=not with_answers),
        rows,
        images,
        per_sample=lambda: per_sample_inputs(processor, template.text),
        pad_id=_pad_id(processor),
        left=not with_answers,
    )
    lengths = [int(length) for length in inputs["attention_mask"].sum(1).tolist()]
    if not with_answers:
        return Encoded(inputs=inputs, labels=None, images=images, prompt_lengths=tuple(lengths))
    labels = torch.full_like(inputs["input_ids"], IGNORE)
    starts: list[int] = []
    for s, (row, text) in enumerate(zip(rows, texts, strict=True)):
        ids = inputs["input_ids"][s, : lengths[s]]
        spans = expanded_spans(
            processor,
            template,
            row,
            own=text.ids,
            spans=text.spans,
            ids=ids.tolist(),
            process=lambda some: _process(processor, template, [some], prompt=False)["input_ids"][0].tolist(),
        )
        for start, end in spans:
            labels[s, start:end] = ids[start:end]
        starts.append(spans[-1][0])
    return Encoded(inputs=inputs, labels=labels, images=images, prompt_lengths=tuple(starts))


def template_of(processor: ProcessorMixin, declaration: LabelRule | None) -> ChatTemplate:
    """The processor's checked template under a declaration."""
    return chat_template(processor, plain_markers=getattr(declaration, "plain_markers", ()))


def stop_ids(processor: ProcessorMixin, generation_config: Any, *, declaration: LabelRule) -> list[int]:
    """For `generate(eos_token_id=...)`: the end of turn that is trained, and where the model has stopped so far."""
    own = generation_config.eos_token_id
    own = [] if own is None else [own] if isinstance(own, int) else list(own)
    return sorted({template_of(processor, declaration).end_id, *map(int, own)})


def normalised(messages: Conversation, *, with_answers: bool) -> list[dict[str, Any]]:
    """The messages with lists as content, ending where training or generation wants them to end.

    Raises:
        ValueError: an unknown kind of content, an image without its data, no answer.
    """
    rows: list[dict[str, Any]] = []
    for message in messages:
        content = message["content"]
        # Templates that walk over content would walk over a string's letters and drop the text in silence.
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else [dict(part) for part in content]
        for part in parts:
            kind = part.get("type")
            if kind not in PARTS:
                raise ValueError(f"content: got type {kind!r}; expected image or text. Remove it from the data.")
            if part.get(kind) is None:
                raise ValueError(f"content: got {kind} without its data; expected {{'type': {kind!r}, {kind!r}: ...}}.")
        rows.append({**message, "content": parts})
    answered = bool(rows) and rows[-1]["role"] == "assistant"
    if with_answers and not answered:
        raise ValueError(
            "conversation: got no answer at its end; expected an assistant's message, which training teaches. Add it."
        )
    asked = rows[:-1] if answered and not with_answers else rows
    if not asked or (with_answers and len(asked) == 1):
        raise ValueError("conversation: got no question; expected a user's message before the answer. Add it.")
    return asked


def image_count(messages: Conversation) -> int:
    """How many images a normalised conversation has."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def instruction_ids(
    processor: ProcessorMixin, texts: Sequence[str], *, declaration: LabelRule | None = None
) -> tuple[Tensor, Tensor]:
    """The tokens of each text alone, as the prompt holds them, without special tokens: what the router reads.

    A word has other tokens at the start of a text than inside a prompt, where something comes before it. So each text
    is put into the chat template and the tokens that overlap it are taken out again. Tokenizers that report no offsets
    encode the text by itself.

    Returns:
        ids and mask, int64 [B, L], right-padded, on the CPU.

    Raises:
        ValueError: a text without a token.
    """
    template = template_of(processor, declaration)
    before, *_ = _asked(processor, template, PROBE).split(PROBE)
    rows = [_ids_in_prompt(processor, template, before, text) for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if not row:
            raise ValueError(
                f"instruction: got a text without a token ({text!r}); expected text, which the router reads. Write an "
                f"instruction."
            )
    width = max(map(len, rows), default=0)
    pad = _pad_id(processor)
    ids = [row + [pad] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return torch.tensor(ids, device="cpu", dtype=torch.long), torch.tensor(mask, device="cpu", dtype=torch.long)


def _asked(processor: ProcessorMixin, template: ChatTemplate, text: str) -> str:
    row = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    return template.render(processor, row, prompt=True)


def _ids_in_prompt(processor: ProcessorMixin, template: ChatTemplate, before: str, text: str) -> list[int]:
    tokenizer = cast(Any, processor).tokenizer
    text = text.strip()
    if not text or not tokenizer.is_fast:
        return cast(list[int], tokenizer.encode(text, add_special_tokens=False))
    rendered = _asked(processor, template, text)
    start = rendered.find(text, len(before))
    if start < 0 or not rendered.startswith(before):
        raise ValueError(
            f"chat_template: got a template that changes the user's text {text!r}; expected it as it is. Correct the "
            f"template."
        )
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    return [
        number
        for number, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        if first < start + len(text) and last > start
    ]


def _pad_id(processor: ProcessorMixin) -> int:
    return int(cast(Any, processor).tokenizer.pad_token_id)


def _process(
    processor: ProcessorMixin, template: ChatTemplate, rows: Sequence[Conversation], *, prompt: bool
) -> dict[str, Tensor]:
    text = {"padding": True, "padding_side": "left" if prompt else "right", "return_attention_mask": True}
    # Processors make tensors on torch's default device, but the ids are read here.
    with torch.device("cpu"):
        batch: Mapping[str, Any] = cast(Any, processor).apply_chat_template(
            [[dict(message) for message in row] for row in rows],
            chat_template=template.text,
            add_generation_prompt=prompt,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"text_kwargs": text},
        )
        return {name: torch.as_tensor(value) for name, value in batch.items()}
