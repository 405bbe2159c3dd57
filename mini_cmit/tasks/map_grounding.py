# SPDX-License-Identifier: Apache-2.0
"""Task 2, map grounding (the form of SK-VG): told the color of a region, give its box; metric IoU >= 0.5.

"Ohio is the green one. Give the box of Ohio as x1 y1 x2 y2." One region in a strong color, on a third of the maps with
a gray one beside it, each in its own quarter; the answer is in 1/100 of the image side. Without the image nothing tells
one place from another: quarters and colors are drawn independently of the names. A second strong color would ask for
more than a language model of a few million parameters can do: to find, among several things, the one that was named.
"""

from __future__ import annotations

import random
from typing import Final

from mini_cmit.tasks.building import BuildContext, Drawn, TaskRows, box_question, build_task
from mini_cmit.tasks.regions import MAP_COLOURS, draw_map, place_in_cells, regions

NAME: Final = "map_grounding"
METRIC: Final = "iou"
COUNTS: Final = (1, 1, 2)  # regions on a map
GRAY: Final = "#b4b4b4"


def draw(rng: random.Random, pool: str, side: int) -> Drawn:
    """A map of one or two regions; the one that is not gray is asked for."""
    count = rng.choice(COUNTS)
    chosen = rng.sample(regions(pool), count)
    while len({region.entity for region in chosen}) < count:
        chosen = rng.sample(regions(pool), count)
    placements = place_in_cells(rng, chosen, (rng.choice(MAP_COLOURS), GRAY)[:count])
    target = placements[0]
    name = target.region.name
    return Drawn(
        image=draw_map(rng, side, placements),
        instruction=f"{name} is the {target.colour} one. {box_question(name)}",
        answers=(" ".join(str(value) for value in target.box),),
        entities=tuple(region.entity for region in chosen),
    )


def build(context: BuildContext) -> TaskRows:
    """The rows of the task; its images are written below `context.root`."""
    return build_task(context, NAME, METRIC, draw)
