# SPDX-License-Identifier: Apache-2.0
"""Task 1, icon captions (the form of VizWiz-Caption): one large icon in one colour on another; metric CIDEr.

The phrase of an icon ("cloud with rain") is read off its file name (see `icons`). No icon of the test split is met in
training; its words are, on other icons. The references say the same in several orders; the training target is always
the first form, so that a model spends its samples on what is shown and not on how it is put.
"""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from typing import Final

from mini_cmit.tasks.building import (
    CAPTION_INSTRUCTION,
    BuildContext,
    Drawn,
    TaskRows,
    build_task,
    contrasting_pair,
    paste,
    textured_canvas,
)
from mini_cmit.tasks.icons import Icon, icon_image, icons_in_pool, part_of_icon, with_article

NAME: Final = "icon_captions"
METRIC: Final = "cider_percent"
# A word that fewer icons of the train split show could be seen in the test split and not have been learnt.
MIN_TRAIN_ICONS: Final = 4
# Pairs that a frozen stem confuses (orange and red, brown and black, gray and any) are left out.
PALETTE: Final = ("red", "yellow", "green", "blue", "purple", "pink", "black", "white")


@cache
def _learnable_words() -> frozenset[str]:
    """Nouns and additions that at least `MIN_TRAIN_ICONS` icons of the train split show."""
    counts = Counter(
        word
        for icon in icons_in_pool("train")
        if part_of_icon(icon.name) == "captions"
        for word in (icon.noun, icon.addition)
    )
    return frozenset(word for word, count in counts.items() if count >= MIN_TRAIN_ICONS)


@cache
def _icons(pool: str) -> dict[str, tuple[Icon, ...]]:
    """{noun: icons}: drawn by noun first, or a third of the images would show files and speech bubbles."""
    by_noun: dict[str, list[Icon]] = {}
    for icon in icons_in_pool(pool):
        if part_of_icon(icon.name) == "captions" and {icon.noun, icon.addition} <= _learnable_words():
            by_noun.setdefault(icon.noun, []).append(icon)
    return {noun: tuple(icons) for noun, icons in by_noun.items()}


def captions(icon: Icon, colour: str, background: str) -> tuple[str, ...]:
    """The training target and four paraphrases."""
    bare = icon.phrase.removeprefix("solid ")
    style = "solid " if icon.solid else ""
    main, _, addition = bare.partition(" with ")
    told = f" with {addition}" if addition else ""
    thing = f"{style}{colour} {main}{told}"
    return (
        f"{with_article(thing)} on a {background} background",
        f"an icon of {with_article(thing)} on {background}",
        f"on a {background} background there is {with_article(thing)}",
        f"{with_article(f'{style}{main}')}{told} drawn in {colour} on a {background} background",
        f"{thing}, {background} background",
    )


def draw(rng: random.Random, pool: str, side: int) -> Drawn:
    """One icon at three quarters of the image's side, moved a little off the centre."""
    by_noun = _icons(pool)
    icon = rng.choice(by_noun[rng.choice(list(by_noun))])
    colour, background = contrasting_pair(rng, PALETTE)
    image = textured_canvas(rng, side, background)
    size = round(side * rng.uniform(0.68, 0.84))
    room = side - size
    paste(image, icon_image(icon.name, size, colour), rng.randint(0, room), rng.randint(0, room))
    return Drawn(
        image=image,
        instruction=CAPTION_INSTRUCTION,
        answers=captions(icon, colour, background),
        entities=(icon.name,),
    )


def build(context: BuildContext) -> TaskRows:
    """The rows of the task; its images are written below `context.root`."""
    return build_task(context, NAME, METRIC, draw)
