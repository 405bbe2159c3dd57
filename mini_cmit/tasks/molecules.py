# SPDX-License-Identifier: Apache-2.0
"""Task 9, molecules (the form of PMC-VQA): rings, elements and groups of a drawn compound; metric option letter.

Three questions of four options, which stand in one order always (see `icon_questions`). The option is drawn first, then
a compound is sought that has it and none of the other three: the letter is uniform, and the question says nothing about
it. Compounds are disjoint between the splits.
"""

from __future__ import annotations

import functools
import random
from typing import Final

from mini_cmit.tasks.building import LETTERS, BuildContext, Drawn, TaskRows, build_task, multiple_choice
from mini_cmit.tasks.compounds import Compound, compounds, draw_compound

NAME: Final = "molecules"
METRIC: Final = "option_letter"
# Elements and groups are asked of smaller molecules than rings: the fewer atoms, the larger each is drawn.
FEW_ATOMS: Final = 8
# The options of a question, in their order.
RINGS: Final = ("0", "1", "2", "3")
ELEMENT_OPTIONS: Final = ("bromine", "chlorine", "nitrogen", "sulfur")
GROUP_OPTIONS: Final = ("alcohol", "benzene ring", "nitrile", "nitro group")
Question = tuple[str, tuple[str, ...], int, tuple[Compound, ...]]


def _rings(rng: random.Random, pool: str) -> Question:
    place = rng.randrange(4)
    return "How many rings does the molecule have?", RINGS, place, _with_rings(pool, place)


def _element(rng: random.Random, pool: str) -> Question:
    place = rng.randrange(4)
    return "Which element is in the molecule?", ELEMENT_OPTIONS, place, _with_one(pool, "elements", place)


def _group(rng: random.Random, pool: str) -> Question:
    place = rng.randrange(4)
    return "Which group is in the molecule?", GROUP_OPTIONS, place, _with_one(pool, "groups", place)


@functools.cache
def _with_rings(pool: str, count: int) -> tuple[Compound, ...]:
    return tuple(one for one in compounds(pool) if one.rings == count)


@functools.cache
def _with_one(pool: str, feature: str, place: int) -> tuple[Compound, ...]:
    """Small compounds that have the option at ``place`` and none of the other three."""
    options = ELEMENT_OPTIONS if feature == "elements" else GROUP_OPTIONS
    return tuple(
        one
        for one in compounds(pool)
        if one.atoms <= FEW_ATOMS and _features(one, feature) & {*options} == {options[place]}
    )


def _features(compound: Compound, feature: str) -> frozenset[str]:
    return compound.elements if feature == "elements" else compound.groups


# Elements twice: their coloured discs are what so coarse a view tells best.
KINDS: Final = (_rings, _element, _element, _group)


def draw(rng: random.Random, pool: str, side: int) -> Drawn:
    """One compound and one question with four options."""
    question, options, place, candidates = rng.choice(KINDS)(rng, pool)
    compound = rng.choice(candidates)
    return Drawn(
        image=draw_compound(rng, side, compound),
        instruction=multiple_choice(question, options),
        answers=(LETTERS[place],),
        options=options,
        entities=(compound.entity,),
    )


def build(context: BuildContext) -> TaskRows:
    """The rows of the task; its images are written below `context.root`."""
    return build_task(context, NAME, METRIC, draw)
