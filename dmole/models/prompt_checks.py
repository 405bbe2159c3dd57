# SPDX-License-Identifier: Apache-2.0
"""Checks of a whole data set's conversations before training: special tokens in texts, lengths, lengths of answers.

Images are not decoded: how many tokens an image takes is found on a blank image of its size.

    training      prompt + answer            <=  max_position_embeddings
    evaluation    prompt + max_new_tokens    <=  max_position_embeddings,   answer <= max_new_tokens
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from PIL import Image
from transformers import ProcessorMixin

from dmole.config_error import ConfigError
from dmole.models.answers import answer_spans
from dmole.models.chat_template import PROBE, Conversation, tokens
from dmole.models.prompts import LabelRule, encode, image_count, normalised, template_of
from dmole.models.row_text import check_row

Sizes = tuple[tuple[int, int], ...]


def check_conversations(
    processor: ProcessorMixin,
    conversations: Iterable[tuple[str, Conversation]],
    config: Any,
    *,
    declaration: LabelRule,
    max_new_tokens: int | None = None,
) -> None:
    """Raise `ConfigError` that names the first conversation which cannot be trained on, or evaluated.

    Args:
        conversations: (name, messages), the name as the error shall give it ("charts/train sample '7'"). To check
            several references of one question, give one conversation for each.
        config: the model's; a text config without `max_position_embeddings` has no limit.
        max_new_tokens: None checks for training; a number, for evaluation with so many tokens for an answer.
    """
    room = getattr(config.get_text_config(), "max_position_embeddings", None)
    expansions: dict[Sizes, int] = {}
    for name, messages in conversations:
        try:
            _check(processor, messages, room, declaration, max_new_tokens, expansions)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from error


def answer_length(processor: ProcessorMixin, messages: Conversation, *, declaration: LabelRule) -> int:
    """How many tokens the last answer takes, with its end of turn: what `max_new_tokens` has to leave room for."""
    row = normalised(messages, with_answers=True)
    template = template_of(processor, declaration)
    text = template.render(processor, row)
    _, spans = answer_spans(processor, template, row, declaration.labels, text)
    return spans[-1][1] - spans[-1][0]


def prompt_length(
    processor: ProcessorMixin,
    messages: Conversation,
    *,
    with_answers: bool,
    declaration: LabelRule,
    expansions: dict[Sizes, int] | None = None,
) -> int:
    """How many tokens a conversation takes with its images, of which only the sizes are read.

    `expansions` keeps what images of given sizes add, for calls on the same processor.
    """
    template = template_of(processor, declaration)
    row = normalised(messages, with_answers=with_answers)
    known: dict[Sizes, int] = {} if expansions is None else expansions
    sizes = tuple(part["image"].size for message in row for part in message["content"] if part["type"] == "image")
    if sizes not in known:
        blank = [{"type": "image", "image": Image.new("RGB", size)} for size in sizes]
        asked = [{"role": "user", "content": [*blank, {"type": "text", "text": PROBE}]}]
        ids = encode(processor, [asked], with_answers=False, declaration=declaration).inputs["input_ids"][0]
        known[sizes] = len(ids) - len(tokens(processor, template.render(processor, asked, prompt=True)))
    return known[sizes] + len(tokens(processor, template.render(processor, row, prompt=not with_answers)))


def _check(
    processor: ProcessorMixin,
    messages: Conversation,
    room: int | None,
    declaration: LabelRule,
    max_new_tokens: int | None,
    expansions: dict[Sizes, int],
) -> None:
    training = max_new_tokens is None
    answered = bool(messages) and messages[-1]["role"] == "assistant"
    check_row(processor, template_of(processor, declaration), normalised(messages, with_answers=training or answered))
    length = prompt_length(processor, messages, with_answers=training, declaration=declaration, expansions=expansions)
    if max_new_tokens is None:
        answer_length(processor, messages, declaration=declaration)
    else:
        length += max_new_tokens
        if answered:
            answer = answer_length(processor, messages, declaration=declaration)
            if answer > max_new_tokens:
                raise ValueError(
                    f"evaluation.max_new_tokens: got {max_new_tokens} for an answer of {answer} tokens with its end of "
                    f"turn; expected at least {answer}, or a right answer is cut. Raise evaluation.max_new_tokens."
                )
    if room is not None and length > room:
        images = image_count(normalised(messages, with_answers=training))
        raise ValueError(
            f"length: got {length} tokens with {images} images and the answer; expected at most the model's {room} "
            f"positions. Shorten the text, take fewer or smaller images, or lower evaluation.max_new_tokens."
        )
