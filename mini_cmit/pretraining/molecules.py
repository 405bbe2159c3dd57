# SPDX-License-Identifier: Apache-2.0
"""Drawings of compounds that no task uses: rings, elements, groups, size."""

from __future__ import annotations

import random

from mini_cmit.pretraining.scene import SIDE, Scene, Turn, multiple_choice
from mini_cmit.tasks.compounds import ELEMENTS, GROUPS, compounds, draw_compound


def molecule_scene(rng: random.Random) -> Scene:
    """One compound of 4 to 14 heavy atoms."""
    compound = rng.choice(compounds("pretraining"))
    while compound.atoms > 9 and rng.random() < 0.4:
        compound = rng.choice(compounds("pretraining"))
    rings, elements, groups = str(compound.rings), sorted(compound.elements), sorted(compound.groups)
    turns = [
        Turn("Count the rings. Answer briefly.", rings),
        Turn("List the elements.", " and ".join(elements) or "carbon"),
        Turn("List the groups.", " and ".join(groups) or "no group"),
        Turn("Is the molecule large? Answer briefly.", "yes" if compound.atoms > 9 else "no"),
        multiple_choice(rng, "How many rings are drawn?", rings, list("01234")),
    ]
    asked = rng.choice(list(ELEMENTS))
    turns.append(Turn(f"Does it contain {asked}? Answer briefly.", "yes" if asked in elements else "no"))
    wanted = rng.choice(list(GROUPS))
    turns.append(Turn(f"Does it have a {wanted}? Answer briefly.", "yes" if wanted in groups else "no"))
    if elements:
        absent = [name for name in ELEMENTS if name not in elements]
        turns.append(multiple_choice(rng, "Which element do you see?", rng.choice(elements), absent))
    rng.shuffle(turns)
    return Scene(draw_compound(rng, SIDE, compound), tuple(turns[:5]))
