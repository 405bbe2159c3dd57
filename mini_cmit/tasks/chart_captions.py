# SPDX-License-Identifier: Apache-2.0
"""Task 6, chart captions (the form of Flickr30k): kind, colour, trend and highest point of a real series; metric CIDEr.

"a red line chart that rises, highest on the right." is the training target; the references say the same in other
words. Kind, colour and trend are balanced, so that no constant caption describes many charts.
"""

from __future__ import annotations

import random
from typing import Final

from mini_cmit.tasks.building import CAPTION_INSTRUCTION, BuildContext, Drawn, TaskRows, build_task
from mini_cmit.tasks.charts import (
    CHART_COLOURS,
    KINDS,
    SIDES,
    TRENDS,
    Kind,
    Side,
    Trace,
    Trend,
    curve_with,
    draw_chart,
    series,
)

NAME: Final = "chart_captions"
METRIC: Final = "cider_percent"
PART: Final = 0
POINTS: Final[dict[Kind, tuple[int, int]]] = {"line": (8, 16), "bar": (8, 10), "area": (8, 16), "dot": (8, 12)}

_MARKS: Final[dict[Kind, str]] = {"line": "line", "bar": "bars", "area": "filled area", "dot": "dots"}
_THAT: Final[dict[Trend, str]] = {
    "rise": "rises",
    "fall": "falls",
    "peak": "rises and then falls",
    "dip": "falls and then rises",
    "zigzag": "goes up and down",
}
_VALUES: Final[dict[Trend, str]] = {
    "rise": "increase from left to right",
    "fall": "decrease from left to right",
    "peak": "increase and then decrease",
    "dip": "decrease and then increase",
    "zigzag": "jump up and down",
}
_NOUN: Final[dict[Trend, str]] = {
    "rise": "an upward trend",
    "fall": "a downward trend",
    "peak": "a peak",
    "dip": "a valley",
    "zigzag": "a zigzag",
}
_WHERE: Final[dict[Side, str]] = {"left": "on the left", "middle": "in the middle", "right": "on the right"}


def captions(kind: Kind, colour: str, trend: Trend, highest: Side) -> tuple[str, ...]:
    """Five ways to say what a chart shows; the first is the training target."""
    marks, where = _MARKS[kind], _WHERE[highest]
    plural = kind in ("bar", "dot")
    article, kind_article = "an" if colour == "orange" else "a", "an" if kind == "area" else "a"
    return (
        f"{article} {colour} {kind} chart that {_THAT[trend]}, highest {where}.",
        f"{kind_article} {kind} chart in {colour} that {_THAT[trend]}, with its highest point {where}.",
        f"{colour} {marks} {'show' if plural else 'shows'} {_NOUN[trend]}, highest {where}.",
        f"the values of the {colour} {kind} chart {_VALUES[trend]} and are highest {where}.",
        f"{_NOUN[trend]} drawn with {'' if plural else article + ' '}{colour} {marks}, the maximum is {where}.",
    )


def draw(rng: random.Random, pool: str, side: int) -> Drawn:
    """One chart; kind, colour, trend and side are drawn first, then a window of a series that shows them."""
    kind, colour, trend = rng.choice(KINDS), rng.choice(CHART_COLOURS), rng.choice(TRENDS)
    drawn = curve_with(rng, series(pool, PART), trend, rng.randint(*POINTS[kind]), rng.choice(SIDES[trend]))
    return Drawn(
        image=draw_chart(rng, side, kind, [Trace(heights=drawn.heights, colour=colour)]),
        instruction=CAPTION_INSTRUCTION,
        answers=captions(kind, colour, trend, drawn.highest),
        entities=(drawn.entity,),
    )


def build(context: BuildContext) -> TaskRows:
    """The rows of the task; its images are written below `context.root`."""
    return build_task(context, NAME, METRIC, draw)
