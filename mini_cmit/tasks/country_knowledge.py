# SPDX-License-Identifier: Apache-2.0
"""Task 8, country knowledge (the form of KVQA): name, capital or world region of a drawn country; metric exact match.

A fact must be seen to be known, so the 24 countries are the same in all splits and the *rendering* is split: colour,
ground, zoom, shift and surroundings together decide the pool, and no rendering is in two splits. Countries and
questions are balanced, so a constant answer is right for one region question in four and else for one in 24.
"""

from __future__ import annotations

import random
from typing import Final

from mini_cmit.tasks.building import BuildContext, Drawn, TaskRows, build_task, pool_of, short_answer
from mini_cmit.tasks.countries import Country, countries, draw_country, random_rendering

NAME: Final = "country_knowledge"
METRIC: Final = "exact_match"
QUESTIONS: Final = (
    "Which country is shown?",
    "What is the capital of this country?",
    "Which world region is this country in?",
)


def fact(country: Country, question: str) -> str:
    """The answer to one of `QUESTIONS`, as countryinfo has it."""
    return dict(zip(QUESTIONS, (country.name, country.capital, country.region), strict=True))[question]


def draw(rng: random.Random, pool: str, side: int) -> Drawn:
    """One country in a rendering of the pool, and one question; both are drawn evenly."""
    country, question = rng.choice(countries(pool)), rng.choice(QUESTIONS)
    rendering = random_rendering(rng, country)
    while pool_of(rendering.entity) != pool:
        rendering = random_rendering(rng, country)
    return Drawn(
        image=draw_country(rng, side, rendering),
        instruction=short_answer(question),
        answers=(fact(country, question),),
        entities=(rendering.entity,),
    )


def build(context: BuildContext) -> TaskRows:
    """The rows of the task; its images are written below `context.root`."""
    return build_task(context, NAME, METRIC, draw)
