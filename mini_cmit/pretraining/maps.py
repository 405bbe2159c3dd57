# SPDX-License-Identifier: Apache-2.0
"""Maps of regions that no task uses: which colours, where, how many, and the box of one."""

from __future__ import annotations

import random

from mini_cmit.pretraining.scene import SIDE, Scene, Turn, multiple_choice
from mini_cmit.tasks.regions import MAP_COLOURS, draw_map, place, regions


def _side_of(box: tuple[int, int, int, int]) -> str:
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    row = "top" if y < 40 else "bottom" if y > 60 else ""
    column = "left" if x < 40 else "right" if x > 60 else ""
    return f"{row} {column}".strip() or "center"


def map_scene(rng: random.Random) -> Scene:
    """One to four coloured regions; names are given in the question and never written on the map."""
    count = rng.choice((1, 2, 2, 3, 3, 4))
    placements = place(rng, rng.sample(regions("pretraining"), count))
    image = draw_map(rng, SIDE, placements)
    target = placements[0]
    name = target.region.name
    colours = [p.colour for p in placements]
    box = " ".join(map(str, target.box))
    turns = [
        Turn("How many regions are there? Answer briefly.", str(count)),
        Turn("List the colors.", " and ".join(sorted(colours))),
        Turn(f"Give the box of the {target.colour} region as x1 y1 x2 y2.", box),
        Turn(f"Where is the {target.colour} region? Answer briefly.", _side_of(target.box)),
        Turn(f"{name} is the {target.colour} one. Where is {name}? Answer briefly.", _side_of(target.box)),
        multiple_choice(
            rng,
            "Which color is on the map?",
            target.colour,
            [c for c in MAP_COLOURS if c not in colours] + ["black", "white", "pink"],
        ),
    ]
    asked = rng.choice(MAP_COLOURS)
    turns.append(Turn(f"Is there a {asked} region? Answer briefly.", "yes" if asked in colours else "no"))
    rng.shuffle(turns)
    return Scene(image, tuple(turns[:5]))
