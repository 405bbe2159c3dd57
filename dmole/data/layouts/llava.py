# SPDX-License-Identifier: Apache-2.0
"""LLaVA's and ShareGPT's conversations: `train.json` and `test.json` (or .jsonl; `validation` or `val` too).

    {"id": ..., "image": "a.jpg" or "images": [...], "conversations": [{"from": "human", "value": "<image>\\n..."},
                                                                        {"from": "gpt", "value": "..."}]}

"<image>" stands where a picture is shown; without one, the pictures are in front of the first question. All answers
of a conversation are taught, as LLaVA does; the last one is tested. A record of a test may instead be a question as
LLaVA's evaluation has them, {"question_id", "image", "text", "answer"}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dmole.data.layouts.base import Dropped, Layout, Row, Rows, first_of, read_json

NAMES = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MARK = "<image>"


def records(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, record) of a JSON list, or of JSON lines."""
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: got no JSON ({error}); expected one object a line.") from None
                yield f"{path.name}:{number}", record
        return
    for number, record in enumerate(read_json(path)):
        yield f"{path.name}[{number}]", record


def row_of(record: dict[str, Any], where: str) -> Row | Dropped:
    """A conversation or a question as a plain row, or as messages where a plain row cannot hold it."""
    pictures = record.get("images") if "images" in record else record.get("image")
    images = [pictures] if isinstance(pictures, str) else list(pictures or [])
    key = record.get("id", record.get("question_id"))
    row: Row = {} if key is None else {"id": str(key)}
    if "conversations" not in record:
        answer = record.get("answer")
        if "text" not in record or answer is None:
            return Dropped(where, "neither conversations nor text and answer")
        answers = list(map(str, answer)) if isinstance(answer, list) else [str(answer)]
        text = record["text"].replace(MARK, "").strip()
        return {"id": where, **row, "images": images, "instruction": text, "answers": answers}
    messages: list[tuple[str, list[dict[str, str]]]] = []
    for turn in record["conversations"]:
        role = ROLES.get(turn.get("from", turn.get("role")))
        if role is None:
            return Dropped(where, f"a turn from {turn.get('from', turn.get('role'))!r}")
        pieces = str(turn.get("value", turn.get("content", ""))).split(MARK)
        content: list[dict[str, str]] = []
        for number, piece in enumerate(pieces):
            content += [{"type": "image"}] if number else []
            content += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
        messages.append((role, content))
    marked = sum(part["type"] == "image" for _, content in messages for part in content)
    if marked not in (0, len(images)):
        return Dropped(where, f"{MARK} stands {marked} times beside {len(images)} images")
    if not messages or messages[-1][0] != "assistant":
        return Dropped(where, "the last turn is not an answer")
    asked = [part["type"] for part in messages[0][1]]
    if [role for role, _ in messages] == ["user", "assistant"] and asked == ["image"] * marked + ["text"]:
        question, answer = ("".join(part.get("text", "") for part in content) for _, content in messages)
        return {"id": where, **row, "images": images, "instruction": question, "answers": [answer]}
    turns = [{"role": role, "content": content} for role, content in messages]
    return {"id": where, **row, "messages": turns, "images": images}


def _rows(source: Path, split: str, images: Path) -> Rows:
    names = [f"{name}.{ending}" for name in NAMES[split] for ending in ("json", "jsonl")]
    if split == "validation" and not any((source / name).exists() for name in names):
        return
    for where, record in records(first_of(source, *names)):
        yield row_of(record, where)


LAYOUT = Layout(metric="exact_match", files="train.json, test.json, the images", rows=_rows, taught="all")
