# SPDX-License-Identifier: Apache-2.0
"""Scenes told in words instead of shown: the text stands where the image's tokens would, then come the questions.

A language model from nothing has no circuit that looks a thing up in its context or names the letter of an option, and
through pictures alone it hardly finds one: after 100,000, an icon's colour was right in 97 % of the cases and the
letter of that colour at chance. Told scenes have no perception in the way and are unlimited.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from mini_cmit.pretraining.scene import COLOURS, Turn, multiple_choice
from mini_cmit.pretraining.shapes import SHAPES
from mini_cmit.pretraining.words import words
from mini_cmit.tasks import building

_PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
_NAMES = ("Alma", "Bor", "Cora", "Dell", "Elm", "Fargo", "Gale", "Hill", "Iona", "Jura", "Kent", "Lee", "Mesa", "Nova")
_ELEMENTS = ("oxygen", "nitrogen", "chlorine", "bromine", "sulfur", "fluorine", "iodine", "carbon")


@dataclass(frozen=True)
class ToldScene:
    """A context in words, and turns about it."""

    context: str
    turns: tuple[Turn, ...]


def _pool(rng: random.Random) -> tuple[str, ...]:
    """Things of one kind: what the options of one question are made of."""
    numbers = tuple(str(n) for n in range(rng.choice((10, 100, 10000))))[:200]
    return rng.choice((tuple(COLOURS), SHAPES, _PLACES, _ELEMENTS, numbers, words(), words()))


def _option_scene(rng: random.Random) -> ToldScene:
    """The answer stands in the context; which letter has it?"""
    pool = _pool(rng)
    right = rng.choice(pool)
    other = rng.choice(words())
    question = rng.choice(("What is shown?", "Which one is it?", "What do you see?", "Which is right?"))
    context = rng.choice((right, f"{right} {other}", f"{other} {right}", f"It is {right}."))
    pool = tuple(option for option in pool if option != other)
    turns = [multiple_choice(rng, question, right, pool, rng.choice((3, 4, 4, 4))) for _ in range(3)]
    return ToldScene(context, tuple(turns))


def _objects_scene(rng: random.Random) -> ToldScene:
    """Things with a colour, a place and a box; each question asks one property by another, some by a name."""
    count = rng.randint(2, 4)
    colours, shapes = rng.sample(list(COLOURS), count), rng.sample(SHAPES, count)
    places = rng.sample(_PLACES, count)
    boxes = [" ".join(str(v) for v in _box(rng)) for _ in range(count)]
    told = [f"{c} {s} {p} {b}" for c, s, p, b in zip(colours, shapes, places, boxes, strict=True)]
    k = rng.randrange(count)
    name = rng.choice(_NAMES)
    turns = [
        Turn(f"What color is the {shapes[k]}? Answer briefly.", colours[k]),
        Turn(f"Where is the {colours[k]} {shapes[k]}? Answer briefly.", places[k]),
        Turn(f"What shape is {colours[k]}? Answer briefly.", shapes[k]),
        Turn(f"Give the box of the {colours[k]} {shapes[k]} as x1 y1 x2 y2.", boxes[k]),
        Turn(f"{name} is the {colours[k]} one. Where is {name}? Answer briefly.", places[k]),
        Turn(f"{name} is the {colours[k]} one. What shape is {name}? Answer briefly.", shapes[k]),
        Turn("How many shapes are there? Answer briefly.", str(count)),
        multiple_choice(rng, f"What color is the {shapes[k]}?", colours[k], list(COLOURS)),
        multiple_choice(rng, f"Which shape is {colours[k]}?", shapes[k], list(SHAPES)),
        multiple_choice(rng, f"Where is the {shapes[k]}?", places[k], _PLACES),
        multiple_choice(rng, "How many shapes are there?", str(count), [str(n) for n in range(1, 8)]),
    ]
    return ToldScene(", ".join(told), tuple(rng.sample(turns, 4)))


def _box(rng: random.Random) -> tuple[int, int, int, int]:
    left, top = rng.randint(0, 60), rng.randint(0, 60)
    return left, top, left + rng.randint(15, 39), top + rng.randint(15, 39)


def _spelled_scene(rng: random.Random) -> ToldScene:
    """Letters or digits apart; say them together, and the other way round."""
    if rng.random() < 0.5:
        text = rng.choice(words())
        ask, spell = "What does the text say?", "Spell it."
    else:
        text = "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 5)))
        ask, spell = "What number is printed?", "Write the digits apart."
    apart = " ".join(text)
    if rng.random() < 0.5:
        return ToldScene(apart, (Turn(ask, text),))
    return ToldScene(text, (Turn(spell, apart), Turn(ask, text)))


def _repeat_scene(rng: random.Random) -> ToldScene:
    """Many answer tokens for one context: the densest lesson in looking back."""
    text = " ".join(rng.choice(words()) for _ in range(rng.randint(5, 12)))
    return ToldScene(text, (Turn("Repeat.", text),))


def _recall_scene(rng: random.Random) -> ToldScene:
    """Pairs of a letter and a thing, and every pair asked for, by its thing or by its letter."""
    count = rng.randint(3, 6)
    things = rng.sample(sorted(set(_pool(rng))), count)
    letters = building.LETTERS[:count]
    told = "\n".join(f"{letter}. {thing}" for letter, thing in zip(letters, things, strict=True))
    asked = rng.sample(range(count), count)
    if rng.random() < 0.7:
        return ToldScene(told, tuple(Turn(things[k], letters[k]) for k in asked))
    return ToldScene(told, tuple(Turn(letters[k], things[k]) for k in asked))


# (kind, weight): the dense lessons first make the circuits that the others use.
_KINDS: tuple[tuple[Callable[[random.Random], ToldScene], int], ...] = (
    (_repeat_scene, 2),
    (_recall_scene, 5),
    (_option_scene, 3),
    (_objects_scene, 2),
    (_spelled_scene, 1),
)


def told_scene(rng: random.Random) -> ToldScene:
    """One scene of any kind."""
    kinds, weights = zip(*_KINDS, strict=True)
    make: Callable[[random.Random], ToldScene] = rng.choices(kinds, weights)[0]
    return make(rng)
