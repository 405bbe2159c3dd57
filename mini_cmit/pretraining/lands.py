# SPDX-License-Identifier: Apache-2.0
"""Outlines of the countries that no task asks about: name, capital and world region, so that outlines matter."""

from __future__ import annotations

import random

from mini_cmit.pretraining.scene import SIDE, Scene, Turn, multiple_choice
from mini_cmit.tasks.countries import countries, draw_country, random_rendering

_REGIONS = ("Africa", "Americas", "Asia", "Europe", "Oceania")


def land_scene(rng: random.Random) -> Scene:
    """One country, large and filled."""
    known = countries("pretraining")
    country = rng.choice(known)
    rendering = random_rendering(rng, country)
    width, height = country.outline.size
    turns = [
        Turn("Which land is drawn?", country.name),
        Turn("Which city governs the land?", country.capital),
        Turn("On which continent is the land?", country.region),
        multiple_choice(rng, "Which land is drawn?", country.name, [c.name for c in known]),
        multiple_choice(rng, "On which continent is the land?", country.region, _REGIONS),
        Turn("What color is the land? Answer briefly.", rendering.fill),
        Turn("Are neighbours drawn? Answer briefly.", "yes" if rendering.neighbours else "no"),
        Turn("Is it wider than high? Answer briefly.", "yes" if width > height else "no"),
    ]
    first, rest = turns[0], turns[1:]
    rng.shuffle(rest)
    return Scene(draw_country(rng, SIDE, rendering), tuple([first, *rest[:4]] if rng.random() < 0.6 else rest[:5]))
