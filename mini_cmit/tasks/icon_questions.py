# SPDX-License-Identifier: Apache-2.0
"""Task 4, icon questions (the form of IconQA): which color, how many, which corner is empty; metric option letter.

The icons are disjoint from those of the icon captions. The options of a question stand in one order always, as those of
numbers and places do on a form: to look a shuffled letter up is a skill that a language model of a few million
parameters does not have, and the task is about looking at icons. Letters are balanced by construction (a uniform
color, count and corner), so a constant answer and a blind model stay at about one in four.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Final

from PIL import Image

from mini_cmit.tasks.building import (
    LETTERS,
    BuildContext,
    Drawn,
    TaskRows,
    build_task,
    contrasting_pair,
    lightness,
    multiple_choice,
    paste,
    textured_canvas,
)
from mini_cmit.tasks.icons import all_icons, drawings_in_pool, icon_image, part_of_icon

NAME: Final = "icon_questions"
METRIC: Final = "option_letter"
INKS: Final = ("red", "green", "blue", "yellow")
NUMBERS: Final = ("1", "2", "3", "4")
CORNERS: Final = ("top left", "top right", "bottom left", "bottom right")
GRID_CELLS: Final = tuple((column, row) for row in range(3) for column in range(3))


@cache
def _drawings(pool: str) -> tuple[str, ...]:
    """All drawings of a pool except those that the captions show."""
    phrased = frozenset(icon.name for icon in all_icons())
    return tuple(name for name in drawings_in_pool(pool) if name not in phrased or part_of_icon(name) == "questions")


def _asked(question: str, options: tuple[str, ...], place: int, image: Image.Image, name: str) -> Drawn:
    return Drawn(
        image=image,
        instruction=multiple_choice(question, options),
        answers=(LETTERS[place],),
        options=options,
        entities=(name,),
    )


def _which_color(rng: random.Random, pool: str, side: int) -> Drawn:
    """One large icon; its color, not the background's."""
    name = rng.choice(_drawings(pool))
    place = rng.randrange(4)
    grounds = [ground for ground in ("white", "black") if abs(lightness(ground) - lightness(INKS[place])) >= 0.25]
    image = textured_canvas(rng, side, rng.choice(grounds))
    size = round(side * rng.uniform(0.6, 0.86))
    paste(image, icon_image(name, size, INKS[place]), rng.randint(0, side - size), rng.randint(0, side - size))
    return _asked("What color is the icon?", INKS, place, image, name)


def _how_many(rng: random.Random, pool: str, side: int) -> Drawn:
    """One to four copies in the cells of a 3 x 3 grid."""
    name = rng.choice(_drawings(pool))
    place = rng.randrange(4)
    colour, background = contrasting_pair(rng, gap=0.5)
    image = textured_canvas(rng, side, background)
    cell = side / 3
    size = round(cell * 0.9)
    layer = icon_image(name, size, colour)
    room = int(cell) - size
    for column, row in rng.sample(GRID_CELLS, place + 1):
        paste(image, layer, int(column * cell) + rng.randint(0, room), int(row * cell) + rng.randint(0, room))
    return _asked("How many icons are there?", NUMBERS, place, image, name)


def _empty_corner(rng: random.Random, pool: str, side: int) -> Drawn:
    """Three equal icons in the corners of the image, one corner left empty."""
    name = rng.choice(_drawings(pool))
    place = rng.randrange(4)
    colour, background = contrasting_pair(rng, gap=0.5)
    image = textured_canvas(rng, side, background)
    cell = side // 2
    size = round(cell * rng.uniform(0.7, 0.9))
    margin = (cell - size) // 2
    layer = icon_image(name, size, colour)
    for corner in range(4):
        if corner != place:
            paste(image, layer, corner % 2 * cell + margin, corner // 2 * cell + margin)
    return _asked("Which corner is empty?", CORNERS, place, image, name)


KINDS: Final = (_which_color, _how_many, _empty_corner)


def draw(rng: random.Random, pool: str, side: int) -> Drawn:
    """One of the three kinds of question, equally often."""
    return rng.choice(KINDS)(rng, pool, side)


def build(context: BuildContext) -> TaskRows:
    """The rows of the task; its images are written below `context.root`."""
    return build_task(context, NAME, METRIC, draw)
