# SPDX-License-Identifier: Apache-2.0
"""What of a conversation does not depend on its images' pixels: its text, its tokens and where its answers are."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, cast

from PIL import Image
from transformers import ProcessorMixin

from dmole.models.answers import Labels, answer_spans
from dmole.models.chat_template import ChatTemplate, Conversation, check_texts

# A message as (role, ((type, text), ...)), with "" as the text of an image.
_Shape = tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


@dataclass(frozen=True, kw_only=True)
class RowText:
    """The rendered conversation; `ids` and `spans` are those of `answer_spans`."""

    text: str
    ids: tuple[int, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()


def row_text(processor: ProcessorMixin, template: ChatTemplate, row: Conversation, labels: Labels | None) -> RowText:
    """The checked text of a normalised conversation, with its answers if `labels` says how to find them.

    Kept for the last 4,096 conversations, some 20 MB: rendering and finding the answers is a quarter of making a batch
    of small pictures, and the same in every epoch.
    """
    plain = all(
        message.keys() == {"role", "content"}
        and all(part.keys() == {"type", part["type"]} for part in message["content"])
        for message in row
    )
    if not plain:  # a template may read whatever else is in a message
        return _row_text(processor, template, row, labels)
    shape = tuple((m["role"], tuple((p["type"], p.get("text", "")) for p in m["content"])) for m in row)
    return _kept_row_text(processor, len(cast(Any, processor).tokenizer), template, shape, labels)


@functools.lru_cache(maxsize=4096)
def _kept_row_text(
    processor: ProcessorMixin, _tokens: int, template: ChatTemplate, shape: _Shape, labels: Labels | None
) -> RowText:
    image = Image.new("RGB", (1, 1))
    content = [[{"type": kind, kind: image if kind == "image" else text} for kind, text in parts] for _, parts in shape]
    row = [{"role": role, "content": parts} for (role, _), parts in zip(shape, content, strict=True)]
    return _row_text(processor, template, row, labels)


def _row_text(processor: ProcessorMixin, template: ChatTemplate, row: Conversation, labels: Labels | None) -> RowText:
    text = check_row(processor, template, row)
    if labels is None:
        return RowText(text=text)
    ids, spans = answer_spans(processor, template, row, labels, text)
    return RowText(text=text, ids=tuple(ids), spans=tuple(spans))


def check_row(processor: ProcessorMixin, template: ChatTemplate, row: Conversation) -> str:
    """The rendered text of a normalised conversation.

    Raises ValueError for a special token in one of its texts, and for a text that the template leaves out.
    """
    check_texts(template, row)
    text = template.render(processor, row)
    for message in row:
        for part in message["content"]:
            if part["type"] == "text" and part["text"].strip() not in text:
                raise ValueError(
                    f"chat_template: got a template that leaves out the {message['role']}'s text {part['text']!r}; "
                    f"expected every text of the conversation. Correct the template, or the message's role."
                )
    return text
