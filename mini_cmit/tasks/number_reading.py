# SPDX-License-Identifier: Apache-2.0
"""Task 5, number reading (the form of OCR-VQA): two or three handwritten digits side by side; metric exact match.

The digits are real (scikit-learn's), each image of a digit is in one pool only, and every digit is equally likely: a
constant answer or a blind model gets next to nothing.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Final

from mini_cmit.tasks.building import (
    BuildContext,
    Drawn,
    TaskRows,
    build_task,
    contrasting_pair,
    paste,
    rgb,
    short_answer,
    textured_canvas,
)
from mini_cmit.tasks.digits import Digit, digit_images

NAME: Final = "number_reading"
METRIC: Final = "exact_match"
LENGTHS: Final = (2, 3)
QUESTION: Final = "Which digits are shown, from left to right?"


@cache
def _digits(pool: str) -> dict[int, tuple[Digit, ...]]:
    digits = digit_images(pool)
    return {value: tuple(digit for digit in digits if digit.value == value) for value in range(10)}


def draw(rng: random.Random, pool: str, side: int) -> Drawn:
    """Digits in equal cells over the whole width, each as large as its cell allows, about half the image high."""
    digits = [rng.choice(_digits(pool)[rng.randrange(10)]) for _ in range(rng.choice(LENGTHS))]
    colour, background = contrasting_pair(rng, gap=0.5)
    image = textured_canvas(rng, side, background)
    cell = side / len(digits)
    height = round(side * rng.uniform(0.42, 0.52) * (1.2 if len(digits) == 2 else 1.0))
    # One line of writing: the digits share a height and lie almost at one level, as on a form.
    level = rng.randint(round(side * 0.04), round(side * 0.96) - height)
    for place, digit in enumerate(digits):
        layer = digit.layer(height, rgb(colour))
        if layer.width > cell * 0.98:
            layer = layer.resize((round(cell * 0.98), height))
        left = round(cell * place + (cell - layer.width) / 2)
        shift = rng.randint(-round(side * 0.02), round(side * 0.02))
        paste(image, layer, left, level + shift)
    return Drawn(
        image=image,
        instruction=short_answer(QUESTION),
        answers=("".join(str(digit.value) for digit in digits),),
        entities=tuple(digit.entity for digit in digits),
    )


def build(context: BuildContext) -> TaskRows:
    """The rows of the task; its images are written below `context.root`."""
    return build_task(context, NAME, METRIC, draw)
