# SPDX-License-Identifier: Apache-2.0
"""Task 4, icon questions (the form of IconQA): which is shown, how many, where is the odd one; metric option letter.

The icons are disjoint from those of the icon captions. Letters are balanced by construction (a uniform count, a uniform
place, shuffled names), so a constant answer and a blind model stay at about one in four.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Final

import numpy as np

from dmole.data.mini.building import (
    LETTERS,
    BuildContext,
    Drawn,
    TaskRows,
    build_task,
    contrasting_pair,
    multiple_choice,
    paste,
    shuffled_options,
    textured_canvas,
)
from dmole.data.mini.icons import (
    Icon,
    all_icons,
    drawings_in_pool,
    icon_image,
    icons_in_pool,
    part_of_icon,
    with_article,
)

NAME: Final = "icon_questions"
METRIC: Final = "option_letter"
PLACES: Final = ("top left", "top right", "bottom left", "bottom right")
# Two drawings of which less than this share of the common ink overlaps are told apart at a glance.
MAX_OVERLAP: Final = 0.35
# A noun that the train split shows on one icon only could not be told from that icon.
MIN_TRAIN_ICONS: Final = 2
GRID_CELLS: Final = tuple((column, row) for row in range(3) for column in range(3))


@cache
def _drawings(pool: str) -> tuple[str, ...]:
    """Drawings that are only compared or counted; those the captions show are left out."""
    phrased = frozenset(icon.name for icon in all_icons())
    return tuple(name for name in drawings_in_pool(pool) if name not in phrased or part_of_icon(name) == "questions")


@cache
def _question_icons(pool: str) -> dict[str, tuple[Icon, ...]]:
    by_noun: dict[str, list[Icon]] = {}
    for icon in icons_in_pool(pool):
        if part_of_icon(icon.name) == "questions":
            by_noun.setdefault(icon.noun, []).append(icon)
    return {noun: tuple(icons) for noun, icons in by_noun.items()}


@cache
def _named(pool: str) -> dict[str, tuple[Icon, ...]]:
    """{noun: icons}, only nouns that the train split shows on at least `MIN_TRAIN_ICONS` icons."""
    train = _question_icons("train")
    return {noun: icons for noun, icons in _question_icons(pool).items() if len(train.get(noun, ())) >= MIN_TRAIN_ICONS}


def _overlap(one: str, other: str) -> float:
    first, second = (np.asarray(icon_image(name, 24, "black").getchannel("A")) > 96 for name in (one, other))
    union = np.count_nonzero(first | second)
    return float(np.count_nonzero(first & second) / union) if union else 1.0


def _which(rng: random.Random, pool: str, side: int) -> Drawn:
    """One large icon; four nouns."""
    named = _named(pool)
    noun = rng.choice(list(named))
    icon = rng.choice(named[noun])
    # Distractors come from the nouns of this pool: a noun without icons here would never be the answer.
    others = rng.sample([other for other in named if other != noun], 3)
    colour, background = contrasting_pair(rng, gap=0.4)
    image = textured_canvas(rng, side, background)
    size = round(side * rng.uniform(0.7, 0.86))
    paste(image, icon_image(icon.name, size, colour), rng.randint(0, side - size), rng.randint(0, side - size))
    options, letter = shuffled_options(rng, with_article(noun), [with_article(other) for other in others])
    return Drawn(
        image=image,
        instruction=multiple_choice("What does the icon show?", options),
        answers=(letter,),
        options=options,
        entities=(icon.name,),
    )


def _how_many(rng: random.Random, pool: str, side: int) -> Drawn:
    """One to five copies in the cells of a 3 x 3 grid; four numbers that follow each other."""
    name = rng.choice(_drawings(pool))
    place = rng.randrange(4)
    smallest = rng.choice((1, 2))
    options = tuple(str(smallest + step) for step in range(4))
    colour, background = contrasting_pair(rng, gap=0.5)
    image = textured_canvas(rng, side, background)
    cell = side / 3
    size = round(cell * 0.9)
    layer = icon_image(name, size, colour)
    room = int(cell) - size
    for column, row in rng.sample(GRID_CELLS, smallest + place):
        paste(image, layer, int(column * cell) + rng.randint(0, room), int(row * cell) + rng.randint(0, room))
    return Drawn(
        image=image,
        instruction=multiple_choice("How many icons are there?", options),
        answers=(LETTERS[place],),
        options=options,
        entities=(name,),
    )


def _odd_one(rng: random.Random, pool: str, side: int) -> Drawn:
    """Four icons in two rows, three of them equal; four places."""
    common = rng.choice(_drawings(pool))
    odd = rng.choice(_drawings(pool))
    while _overlap(common, odd) > MAX_OVERLAP:
        odd = rng.choice(_drawings(pool))
    place = rng.randrange(4)
    colour, background = contrasting_pair(rng, gap=0.5)
    image = textured_canvas(rng, side, background)
    cell = side // 2
    size = round(cell * 0.84)
    margin = (cell - size) // 2
    for corner in range(4):
        layer = icon_image(odd if corner == place else common, size, colour)
        paste(image, layer, corner % 2 * cell + margin, corner // 2 * cell + margin)
    return Drawn(
        image=image,
        instruction=multiple_choice("Where is the icon that differs from the others?", PLACES),
        answers=(LETTERS[place],),
        options=PLACES,
        entities=(common, odd),
    )


KINDS: Final = (_which, _how_many, _odd_one)


def draw(rng: random.Random, pool: str, side: int) -> Drawn:
    """One of the three kinds of question, equally often."""
    return rng.choice(KINDS)(rng, pool, side)


def build(context: BuildContext) -> TaskRows:
    """The rows of the task; its images are written below `context.root`."""
    return build_task(context, NAME, METRIC, draw)
