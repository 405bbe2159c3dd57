# SPDX-License-Identifier: Apache-2.0
"""Conversations of every shape for tests: one image, several, none, images in a later turn; pictures of noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image


@dataclass(frozen=True)
class Declared:
    """What of a declaration decides the labels."""

    labels: Literal["prefix", "assistant_mask"] = "prefix"
    plain_markers: tuple[str, ...] = ()


def picture(width: int, height: int, seed: int) -> Image.Image:
    pixels = torch.randint(1, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


def user(text: str, *images: Image.Image) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


WIDE, TALL, SMALL = picture(40, 20, 0), picture(20, 40, 1), picture(16, 16, 2)
ONE = [user("What is it?", WIDE), assistant("a red letter")]
TWO = [user("Compare the two.", TALL, SMALL), assistant("yes")]
NONE = [user("What is the capital of this country?"), assistant("A B C")]
LATER = [user("What is it?", WIDE), assistant("red"), user("And this?", TALL), assistant("blue yes")]
TALK = [user("Yes or no?"), assistant("yes"), user("Why?"), assistant("blue")]
