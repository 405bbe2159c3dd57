# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a conversation are the assistant's: those that are trained.

    prefix           ids(conversation)[len(ids(conversation up to the turn, with the generation prompt)) : end of turn]
    assistant_mask   the tokens in the template's generation blocks, up to the end of turn

Both are found on the template's text, where an image is one placeholder, and then moved to where they are in the ids
of the processor, which expands the placeholders; that the same tokens are there is checked, as is the prefix. Every
assistant turn of a conversation is trained. A turn ends with the token by which the template ends it: what comes after
(Gemma's and Qwen's line feed) is never generated. The last turn always has one; earlier turns of a template that writes
none end with their text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, cast

from transformers import ProcessorMixin

from dmole.models.chat_template import ChatTemplate, Conversation, tokenizer_of, tokens

Labels = Literal["prefix", "assistant_mask"]
Spans = list[tuple[int, int]]


def answer_spans(
    processor: ProcessorMixin, template: ChatTemplate, row: Conversation, labels: Labels, text: str
) -> tuple[list[int], Spans]:
    """The ids of `text`, the rendered conversation, and [start, end) of every assistant turn in them.

    Raises:
        ValueError: a prompt is no prefix of its conversation; the generation blocks are missing or mark other text
            than the answers; a turn has no end.
    """
    find = _marked if labels == "assistant_mask" else _after_prompts
    ids = tokens(processor, text)
    return ids, find(processor, template, row, ids)


def expanded_spans(
    processor: ProcessorMixin,
    template: ChatTemplate,
    row: Conversation,
    *,
    own: Sequence[int],
    spans: Sequence[tuple[int, int]],
    ids: Sequence[int],
    process: Callable[[Conversation], list[int]],
) -> Spans:
    """[start, end) of every assistant turn in `ids`, the processor's, in which every image has its full length.

    Args:
        own, spans: of `answer_spans`.
        process: a conversation -> the processor's ids of it; called for turns that images come after, since the
            positions after the last image keep their distance from the end.

    Raises:
        ValueError: the processor changes the template's text beyond images.
    """
    turns = _turns(row)
    seen = [i for i, message in enumerate(row) if any(part["type"] == "image" for part in message["content"])]
    found: Spans = []
    for turn, (start, end) in zip(turns, spans, strict=True):
        whole, placed = ids, list(own)
        if seen and turn < seen[-1]:
            placed = tokens(processor, template.render(processor, row[:turn]))
            whole = process(row[:turn])
        shift = len(whole) - len(placed)
        if list(ids[start + shift : end + shift]) != list(own[start:end]):
            raise ValueError(
                f"labels: got a processor that changes the text of the chat template at message {turn}; expected the "
                f"template's tokens, with images expanded and nothing else. Correct the chat template."
            )
        found.append((start + shift, end + shift))
    return found


def _turns(row: Conversation) -> list[int]:
    return [i for i, message in enumerate(row) if message["role"] == "assistant"]


def _after_prompts(processor: ProcessorMixin, template: ChatTemplate, row: Conversation, ids: list[int]) -> Spans:
    turns = _turns(row)
    starts = []
    for turn in turns:
        prompt = tokens(processor, template.render(processor, row[:turn], prompt=True))
        _check_prefix(processor, prompt, ids, turn)
        starts.append(len(prompt))
    spans: Spans = []
    for turn, (start, limit) in zip(turns, pairwise([*starts, len(ids)]), strict=True):
        if template.appended and turn != turns[-1]:
            own = tokens(processor, template.render(processor, row[: turn + 1], published=True).rstrip())
            _check_prefix(processor, own, ids, turn)
            spans.append((start, len(own)))
        else:
            spans.append((start, _end(template, ids, start, limit, f"an answer at message {turn}")))
    return spans


def _end(template: ChatTemplate, ids: Sequence[int], start: int, limit: int, where: str) -> int:
    for i in range(start, limit):
        if ids[i] == template.end_id:
            return i + 1
    raise ValueError(
        f"labels: got {where} without {template.end!r} at its end; expected the token by which the template ends the "
        f"last turn, since nothing else tells the model to stop. Correct the chat template."
    )


def _check_prefix(processor: ProcessorMixin, prompt: list[int], ids: list[int], turn: int) -> None:
    if ids[: len(prompt)] == prompt:
        return
    wrong = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(ids))
    text = [tokenizer_of(processor).decode(some[max(0, wrong - 3) : wrong + 3]) for some in (prompt, ids)]
    raise ValueError(
        f"labels: got a chat template whose prompt for message {turn} is no prefix of the conversation "
        f"({text[0]!r} became {text[1]!r}); expected the same tokens in both. Set declaration.labels to "
        f"assistant_mask, or correct the chat template."
    )


def _marked(processor: ProcessorMixin, template: ChatTemplate, row: Conversation, ids: list[int]) -> Spans:
    if not template.generation:
        raise ValueError(
            "labels: got assistant_mask and a chat template without a generation block; expected {% generation %} "
            "before the answers and {% endgeneration %} after them. Add them to the template, or set "
            "declaration.labels to prefix."
        )
    tokenizer = tokenizer_of(processor)
    # The tokenizer's mask, not the processor's: that one is shifted by images in some families (Idefics2, Mllama).
    encoded: Any = tokenizer.apply_chat_template(
        [dict(message) for message in row], chat_template=template.source, tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    mask = encoded["assistant_masks"]
    edges = [i for i, (a, b) in enumerate(pairwise([0, *mask, 0])) if a != b]
    spans: Spans = list(zip(edges[::2], edges[1::2], strict=True))
    if template.appended and spans:
        # The end that we append comes right after the last answer, and is in no block.
        spans[-1] = (spans[-1][0], len(ids))
    else:
        spans = [
            (start, _end(template, ids, start, end, f"generation block {number}"))
            for number, (start, end) in enumerate(spans, 1)
        ]
    texts = ["".join(p["text"] for p in row[turn]["content"] if p["type"] == "text") for turn in _turns(row)]
    marked = [cast(str, tokenizer.decode(ids[start:end])) for start, end in spans]
    expected = [cast(str, tokenizer.decode(tokens(processor, text))) for text in texts]
    ends = [template.end if ids[end - 1] == template.end_id else "" for _, end in spans]
    if len(marked) != len(texts) or any(
        _letters(found) != _letters(text + end) for found, text, end in zip(marked, expected, ends, strict=True)
    ):
        raise ValueError(
            f"labels: got generation blocks around {marked!r}; expected them around the answers {texts!r}, each with "
            f"its end of turn. Correct the chat template, or set declaration.labels to prefix."
        )
    return spans


def _letters(text: str) -> str:
    return "".join(text.split())
