# SPDX-License-Identifier: Apache-2.0
"""Task 2, map grounding (the form of SK-VG): told the colour of a region, give its box; metric IoU >= 0.5.

"Ohio is the green one. Give the box of Ohio as x1 y1 x2 y2." Two to four regions in different colours, none
overlapping; the answer is in 1/100 of the image side. Without the image nothing tells one place from another: places
and colours are drawn independently of the names.
"""

from __future__ import annotations

import random
from typing import Final

from dmole.data.mini.building import BuildContext, Drawn, TaskRows, box_question, build_task
from dmole.data.mini.regions import draw_map, place, regions

NAME: Final = "map_grounding"
METRIC: Final = "iou"
# Regions on a map; two are the easy case, four the hard one.
COUNTS: Final = (2, 2, 2, 2, 3, 3, 4)


def draw(rng: random.Random, pool: str, side: int) -> Drawn:
    """A map of two to four regions; the first one placed is asked for."""
    count = rng.choice(COUNTS)
    chosen = rng.sample(regions(pool), count)
    while len({region.entity for region in chosen}) < count:
        chosen = rng.sample(regions(pool), count)
    placements = place(rng, chosen)
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
