# SPDX-License-Identifier: Apache-2.0
"""Task 9, molecules (the form of PMC-VQA): rings, elements and groups of a drawn compound; metric option letter.

Three questions of four options. The options are drawn first and one of them is made the answer, then a compound is
sought that has it and none of the other three; so the options alone say nothing about the answer, and the letter is
uniform. Compounds are disjoint between the splits.
"""

from __future__ import annotations

import functools
import random
from typing import Final

from dmole.data.mini.building import BuildContext, Drawn, TaskRows, build_task, multiple_choice, shuffled_options
from dmole.data.mini.compounds import ELEMENTS, GROUPS, Compound, compounds, draw_compound

NAME: Final = "molecules"
METRIC: Final = "option_letter"
# Elements and groups are asked of smaller molecules than rings: the fewer atoms, the larger each is drawn.
FEW_ATOMS: Final = 8
RINGS: Final = ("0", "1", "2", "3")
Question = tuple[str, str, tuple[str, ...], tuple[Compound, ...]]


def _rings(rng: random.Random, pool: str) -> Question:
    answer = rng.choice(RINGS)
    others = tuple(count for count in RINGS if count != answer)
    return "How many rings does the molecule have?", answer, others, _with_rings(pool, int(answer))


def _element(rng: random.Random, pool: str) -> Question:
    answer, *others = rng.sample(tuple(ELEMENTS), 4)
    return "Which element is in the molecule?", answer, tuple(others), _with(pool, "elements", answer, tuple(others))


def _group(rng: random.Random, pool: str) -> Question:
    answer, *others = rng.sample(tuple(GROUPS), 4)
    return "Which group is in the molecule?", answer, tuple(others), _with(pool, "groups", answer, tuple(others))


@functools.cache
def _with_rings(pool: str, count: int) -> tuple[Compound, ...]:
    return tuple(one for one in compounds(pool) if one.rings == count)


@functools.cache
def _with(pool: str, feature: str, wanted: str, unwanted: tuple[str, ...]) -> tuple[Compound, ...]:
    """Compounds that have one feature and none of the others."""
    return tuple(
        one
        for one in compounds(pool)
        if one.atoms <= FEW_ATOMS
        and wanted in _features(one, feature)
        and not _features(one, feature).intersection(unwanted)
    )


def _features(compound: Compound, feature: str) -> frozenset[str]:
    return compound.elements if feature == "elements" else compound.groups


# Elements twice: their coloured discs are what so coarse a view tells best.
KINDS: Final = (_rings, _element, _element, _group)


def draw(rng: random.Random, pool: str, side: int) -> Drawn:
    """One compound and one question with four options."""
    ask = rng.choice(KINDS)
    question, answer, others, candidates = ask(rng, pool)
    while not candidates:
        question, answer, others, candidates = ask(rng, pool)
    compound = rng.choice(candidates)
    options, letter = shuffled_options(rng, answer, others)
    return Drawn(
        image=draw_compound(rng, side, compound),
        instruction=multiple_choice(question, options),
        answers=(letter,),
        options=options,
        entities=(compound.entity,),
    )


def build(context: BuildContext) -> TaskRows:
    """The rows of the task; its images are written below `context.root`."""
    return build_task(context, NAME, METRIC, draw)
