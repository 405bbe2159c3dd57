# SPDX-License-Identifier: Apache-2.0
"""A pretraining scene: one image and several questions about it, so that one look at a picture teaches many things."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from mini_cmit.tasks import building

SIDE = 160

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (245, 205, 30),
    "orange": (255, 127, 14),
    "purple": (130, 60, 180),
    "pink": (245, 130, 190),
    "brown": (120, 75, 45),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
    "gray": (128, 128, 128),
    "cyan": (40, 190, 210),
}


@dataclass(frozen=True)
class Turn:
    """One question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """An RGB image of side 160 and the turns asked about it, in this order."""

    image: Image.Image
    turns: tuple[Turn, ...]


def jittered(rng: random.Random, name: str, amount: int = 18) -> tuple[int, int, int]:
    """The named colour, each channel moved by at most ``amount``."""
    r, g, b = (max(0, min(255, c + rng.randint(-amount, amount))) for c in COLOURS[name])
    return r, g, b


def background(rng: random.Random, avoid: Sequence[str] = ()) -> tuple[str, tuple[int, int, int]]:
    """A background colour by name, mostly light, none of ``avoid``."""
    light = [c for c in ("white", "white", "white", "yellow", "cyan", "pink", "gray") if c not in avoid]
    dark = [c for c in ("black", "blue", "purple", "brown", "green") if c not in avoid]
    name = rng.choice(light if rng.random() < 0.75 or not dark else dark)
    return name, jittered(rng, name)


def multiple_choice(rng: random.Random, question: str, right: str, wrong: Sequence[str], count: int = 4) -> Turn:
    """A lettered question in the benchmark's own form (``building.multiple_choice``); the right letter is uniform."""
    options = [right, *rng.sample(list(dict.fromkeys(w for w in wrong if w != right)), count - 1)]
    rng.shuffle(options)
    return Turn(building.multiple_choice(question, options), building.LETTERS[options.index(right)])


def box_text(left: float, top: float, right: float, bottom: float) -> str:
    """Pixels of a 160-pixel image -> ``x1 y1 x2 y2`` in hundredths of the side, 0..99."""
    return " ".join(str(max(0, min(99, round(value * 100 / SIDE)))) for value in (left, top, right, bottom))
