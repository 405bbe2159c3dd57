# SPDX-License-Identifier: Apache-2.0
"""From the arguments of `GrownModel.answer` to conversations with opened pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dmole.data.images import open_image
from dmole.data.sample import Sample
from dmole.models.chat_template import Conversation

Picture = str | Path | Image.Image


def conversations_of(images: Any, text: Any, messages: Any) -> tuple[list[Conversation], bool]:
    """The conversations that the arguments of `GrownModel.answer` ask for, and whether they are a single one."""
    if (text is None) == (messages is None):
        got = "neither" if text is None else "both"
        raise ValueError(f"text, messages: got {got}; expected one of them. Pass text= with images=, or messages=.")
    if messages is not None:
        if images is not None:
            raise ValueError("images: got some beside messages; expected them inside. Put them into the content.")
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations = [messages] if single else list(messages)
        return [_opened(conversation) for conversation in conversations], single
    single = isinstance(text, str)
    texts = [text] if single else list(text)
    shown = [[]] * len(texts) if images is None else [images] if single else list(images)
    shown = [[part] if isinstance(part, str | Path | Image.Image) else list(part) for part in shown]
    if len(shown) != len(texts):
        raise ValueError(f"images: got {len(shown)} lists for {len(texts)} questions; expected one list for each.")
    if not texts:
        raise ValueError("text: got no question; expected at least one.")
    return [_asked(pictures, question) for question, pictures in zip(texts, shown, strict=True)], single


def question(place: int, instruction: str) -> Sample:
    """A sample that holds a question's text alone, which is what a router reads besides the encoded batch."""
    return Sample(id=str(place), images=(), instruction=instruction, answers=("",))


def _asked(pictures: Sequence[Picture], text: str) -> Conversation:
    content = [
        *({"type": "image", "image": open_image(picture)} for picture in pictures),
        {"type": "text", "text": text},
    ]
    return [{"role": "user", "content": content}]


def last_text(messages: Conversation) -> str:
    """The text of the user's last message."""
    asked = [message["content"] for message in messages if message["role"] == "user"]
    if not asked:
        raise ValueError("messages: got none of a user; expected a question. Add it.")
    content = asked[-1]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("type") == "text")


def _opened(messages: Conversation) -> Conversation:
    """The conversation with its pictures opened; "image", "path" and "url" hold paths or PIL images."""
    opened = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                {"type": "image", "image": open_image(_picture(part))} if part.get("type") == "image" else dict(part)
                for part in content
            ]
        opened.append({**message, "content": content})
    return opened


def _picture(part: Mapping[str, Any]) -> Picture:
    found = next((part[name] for name in ("image", "path", "url") if part.get(name) is not None), None)
    if isinstance(found, str) and found.partition(":")[0] in ("http", "https", "data"):
        raise ValueError(f"image: got {found[:40]!r}; expected a path or a PIL image. Fetch it first.")
    if not isinstance(found, str | Path | Image.Image):
        raise ValueError(f"image: got {type(found).__name__}; expected a path or a PIL image.")
    return found
