# SPDX-License-Identifier: Apache-2.0
"""Rows as other libraries write them, in the fields of a plain row.

    messages                                   transformers: a conversation, its last assistant message the answer
    prompt, completion                         TRL: what is asked and the answer, each a text or messages
    ... with image or images                   paths, in the order of the conversation's {"type": "image"} parts

`content` is a text or a list of parts: {"type": "text", "text": ...}, {"type": "image"} for the next of the row's
images, {"type": "image", "path": ...} for one in its place ("image" and "url" may name a file too). A row whose
messages have no image part shows its images in front of the first question. A system message, images between texts and
earlier turns are kept as `Turn`s. Nothing is fetched: a URL, a data URI and base64 are refused by name.

An `id` may be missing; it is then the split and the number of the row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, cast

from dmole.data.sample import Turn

FORMATS = ("messages", "prompt", "completion")
ROLES = ("system", "user", "assistant")
_EXTRA = ("id", "image", "images", "answers", "options", "entities")
MESSAGES_KEYS = ("messages", *_EXTRA)
COMPLETION_KEYS = ("prompt", "completion", *_EXTRA)
_PART_KEYS = {"text": ("type", "text"), "image": ("type", "path", "image", "url")}
_REFUSED_KEYS = ("base64", "image_url", "video", "audio", "source")


class RowPairs(list[tuple[str, Any]]):
    """A JSON object as its pairs, so that a key given twice can be seen."""


def row_keys(keys: Iterable[str]) -> tuple[str, ...] | None:
    """The keys that a row of another library may have, by the keys it has; None for a plain row."""
    found = set(keys)
    if "messages" in found:
        return MESSAGES_KEYS
    return COMPLETION_KEYS if found & {"prompt", "completion"} else None


def plain_fields(values: Mapping[str, Any], name: str) -> tuple[dict[str, Any], list[str]]:
    """The fields of a plain row, with `turns` beside them; and what is wrong with the row.

    Args:
        values: a row with `messages`, or with `prompt` and `completion`.
        name: the id of a row that has none.
    """
    reader = _Reader()
    if "messages" in values:
        messages = reader.messages(values["messages"], "messages")
        answer = messages.pop() if messages and messages[-1].role == "assistant" else None
    else:
        for key in ("prompt", "completion"):
            if key not in values:
                reader.complaints.append(f"key {key!r} is missing; expected prompt and completion")
        messages = reader.messages_or_text(values.get("prompt", []), "prompt", "user")
        completed = reader.messages_or_text(values.get("completion", []), "completion", "assistant")
        answer = completed[-1] if completed else None
        if "completion" in values and (len(completed) != 1 or completed[0].role != "assistant"):
            reader.complaints.append("completion is not one answer; expected a text, or one message of the assistant")
    listed = reader.images(values)
    answers = reader.answers(values, answer)
    reader.order(messages, answer)
    turns, images = reader.place(messages, listed)
    asked = next((turn for turn in reversed(turns) if turn.role == "user"), None)
    instruction = "\n".join(part for part in asked.parts if part is not None) if asked else ""
    plain = Turn(role="user", parts=(*(None for _ in images), instruction))
    fields: dict[str, Any] = {
        **{key: values[key] for key in ("options", "entities") if key in values},
        "id": values.get("id", name),
        "images": images,
        "instruction": instruction,
        "answers": answers,
        "turns": () if turns == (plain,) else turns,
    }
    return fields, reader.complaints


class _Reader:
    """Reads the parts of one row; `complaints` gathers what is wrong."""

    def __init__(self) -> None:
        self.complaints: list[str] = []
        self._inline: list[str | None] = []  # by image part, in order: its own path, None for the next of the row's

    def messages_or_text(self, value: object, where: str, role: str) -> list[Turn]:
        if isinstance(value, str):
            return self.messages([RowPairs([("role", role), ("content", value)])], where)
        return self.messages(value, where)

    def messages(self, value: object, where: str) -> list[Turn]:
        if not isinstance(value, list) or isinstance(value, RowPairs):
            self.complaints.append(f"{where} is {kind(value)}; expected a list of messages with role and content")
            return []
        return [turn for i, item in enumerate(value) if (turn := self._message(item, f"{where}[{i}]")) is not None]

    def _message(self, value: object, where: str) -> Turn | None:
        fields = self._object(value, where)
        if fields is None:
            return None
        for key in ("role", "content"):
            if key not in fields:
                self.complaints.append(f"{where} has no {key}; expected role and content")
                return None
        for key in fields:
            if key not in ("role", "content", "name"):
                self.complaints.append(f"{where} has the key {key!r}; expected role and content alone")
        if fields["role"] not in ROLES:
            self.complaints.append(f"{where}.role is {kind(fields['role'])}; expected {', '.join(ROLES)}")
            return None
        content = fields["content"]
        parts = [RowPairs([("type", "text"), ("text", content)])] if isinstance(content, str) else content
        if not isinstance(parts, list) or isinstance(parts, RowPairs):
            self.complaints.append(f"{where}.content is {kind(content)}; expected a text or a list of parts")
            return None
        read = tuple(part for i, item in enumerate(parts) for part in self._part(item, f"{where}.content[{i}]"))
        if not any(part is not None and part.strip() for part in read):
            self.complaints.append(f"{where}.content has no text; expected some")
        if fields["role"] != "user" and None in read:
            self.complaints.append(
                f"{where} shows an image as {fields['role']}; expected images in the user's messages"
            )
        return Turn(role=fields["role"], parts=read)

    def _part(self, value: object, where: str) -> tuple[str | None, ...]:
        fields = self._object(value, where)
        if fields is None:
            return ()
        of = fields.get("type")
        refused = [key for key in (str(of), *fields) if key in _REFUSED_KEYS]
        if refused or not isinstance(of, str) or of not in _PART_KEYS:
            what = f"is of the kind {refused[0]!r}" if refused else f"has type {kind(of)}"
            self.complaints.append(f"{where} {what}; expected a text, or an image by its path. Write pictures to files")
            return ()
        unknown = [key for key in fields if key not in _PART_KEYS[of]]
        if unknown:
            self.complaints.append(f"{where} has the key {unknown[0]!r}; expected {', '.join(_PART_KEYS[of])}")
        if of == "text":
            if not isinstance(fields.get("text"), str):
                self.complaints.append(f"{where}.text is {kind(fields.get('text'))}; expected a string")
                return ()
            return (fields["text"],)
        given = [key for key in ("path", "image", "url") if key in fields]
        if len(given) > 1:
            self.complaints.append(f"{where} names its image twice ({', '.join(given)}); expected one of them")
        path = fields[given[0]] if given else None
        if given and not isinstance(path, str):
            self.complaints.append(f"{where}.{given[0]} is {kind(path)}; expected the path of a file")
        self._inline.append(path if isinstance(path, str) else None)
        return (None,)

    def _object(self, value: object, where: str) -> dict[str, Any] | None:
        if not isinstance(value, RowPairs):
            self.complaints.append(f"{where} is {kind(value)}; expected an object")
            return None
        fields: dict[str, Any] = {}
        for key, item in value:
            if key in fields:
                self.complaints.append(f"{where}: key {key!r} is given twice")
            fields[key] = item
        return fields

    def images(self, values: Mapping[str, Any]) -> list[str]:
        if "image" in values and "images" in values:
            self.complaints.append("has both keys image and images; expected one of them")
        listed = [values["image"]] if "image" in values else values.get("images", [])
        if not isinstance(listed, list) or not all(isinstance(image, str) for image in listed):
            self.complaints.append("images is not a list of paths; expected one string for each image")
            return []
        return cast(list[str], listed)

    def answers(self, values: Mapping[str, Any], answer: Turn | None) -> list[Any]:
        text = "\n".join(part for part in answer.parts if part is not None) if answer else None
        given = values.get("answers")
        if given is None:
            if text is None and not self.complaints:
                self.complaints.append("has no answer; expected the assistant's message at the end, or answers")
            return [text]
        if not isinstance(given, list) or not given:
            self.complaints.append(f"answers is {kind(given)}; expected a list of strings")
            return [text]
        if text is not None and given[0] != text:
            self.complaints.append("answers[0] is not the assistant's last message; expected that text first")
        return given

    def order(self, messages: list[Turn], answer: Turn | None) -> None:
        roles = [turn.role for turn in messages]
        spoken = roles[1:] if roles[:1] == ["system"] else roles
        expected = ["user" if i % 2 == 0 else "assistant" for i in range(len(spoken))]
        if not self.complaints and (spoken != expected or len(spoken) % 2 == 0):
            heard = [*roles, *(["assistant"] if answer else [])]
            self.complaints.append(
                f"roles are {', '.join(heard)}; expected user and assistant in turns, after at most one system "
                "message, with the answer last"
            )

    def place(self, messages: list[Turn], listed: list[str]) -> tuple[tuple[Turn, ...], list[str]]:
        """The turns, and all images in the order of their parts."""
        turns = list(messages)
        if not self._inline and listed:
            first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
            if first is not None:
                shown: tuple[str | None, ...] = (*(None for _ in listed), *turns[first].parts)
                turns[first] = Turn(role="user", parts=shown)
            return tuple(turns), listed
        empty = sum(path is None for path in self._inline)
        if empty != len(listed) and not self.complaints:
            self.complaints.append(
                f"has {empty} image parts without a path and {len(listed)} images; expected as many of each"
            )
            return tuple(turns), listed
        rest = iter(listed)
        return tuple(turns), [next(rest, "") if path is None else path for path in self._inline]


def kind(value: object) -> str:
    """How to name a JSON value in a message."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the string {value[:40]!r}"
    return "an object" if isinstance(value, RowPairs) else "a list"
