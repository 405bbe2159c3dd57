# SPDX-License-Identifier: Apache-2.0
"""Charts of series that no task uses, and of random walks: kind, colour, trend, extremes, comparisons."""

from __future__ import annotations

import random

import numpy as np

from mini_cmit.pretraining.scene import SIDE, Scene, Turn, multiple_choice
from mini_cmit.tasks.charts import (
    CHART_COLOURS,
    KINDS,
    TRENDS,
    Trace,
    Trend,
    Values,
    curve_with,
    draw_chart,
    highest_side,
    series,
    trend_of,
)

# Other words than the tasks': pretraining teaches to see a trend, not how a task wants it told.
_TREND_NAMES: dict[Trend, str] = {
    "rise": "goes up",
    "fall": "goes down",
    "peak": "hill",
    "dip": "hollow",
    "zigzag": "jumps",
}


def _heights(rng: random.Random, points: int) -> tuple[Values, Trend | None]:
    """A real curve of a known trend, or a random walk of whatever trend it has."""
    if rng.random() < 0.6:
        found = curve_with(rng, series("pretraining"), rng.choice(TRENDS), points)
        return found.heights, found.trend
    drift = rng.uniform(-1.2, 1.2)
    walk = np.cumsum([rng.gauss(drift, 1.0) for _ in range(points)])
    heights = (walk - walk.min()) / max(float(np.ptp(walk)), 1e-6)
    return heights, trend_of(heights)


def chart_scene(rng: random.Random) -> Scene:
    """One series drawn as a line, bars, an area or dots."""
    heights, trend = _heights(rng, rng.randint(8, 14))
    kind, colour = rng.choice(KINDS), rng.choice(CHART_COLOURS)
    image = draw_chart(rng, SIDE, kind, [Trace(heights=heights, colour=colour)])
    side = highest_side(heights)
    turns = [
        Turn("What kind of chart is it? Answer briefly.", kind),
        Turn("What color is the chart? Answer briefly.", colour),
        Turn("Is the last value above the first? Answer briefly.", "yes" if heights[-1] > heights[0] else "no"),
        multiple_choice(rng, "What color is the chart?", colour, CHART_COLOURS),
        Turn("Give the heights.", " ".join(str(round(9 * float(h))) for h in heights[:: max(1, len(heights) // 6)])),
    ]
    if trend is not None:
        turns.append(Turn("What shape has the curve? Answer briefly.", _TREND_NAMES[trend]))
        turns.append(
            multiple_choice(rng, "What shape has the curve?", _TREND_NAMES[trend], list(_TREND_NAMES.values()))
        )
    if side is not None:
        turns.append(Turn("Where is the maximum? Answer briefly.", side))
    rng.shuffle(turns)
    return Scene(image, tuple(turns[:5]))


def comparison_scene(rng: random.Random) -> Scene:
    """Two lines, or two to four lettered bars: which is higher, where do they start."""
    if rng.random() < 0.5:
        points = rng.randint(8, 14)
        first, second = rng.sample(CHART_COLOURS, 2)
        pair = [_heights(rng, points)[0] * rng.uniform(0.4, 1.0) for _ in range(2)]
        traces = [Trace(heights=h, colour=c) for h, c in zip(pair, (first, second), strict=True)]
        image = draw_chart(rng, SIDE, "line", traces)
        turns = [Turn("Which colors are drawn?", " and ".join(sorted((first, second))))]
        for question, at in (("starts", 0), ("ends", -1)):
            if abs(pair[0][at] - pair[1][at]) > 0.15:
                upper = first if pair[0][at] > pair[1][at] else second
                turns.append(Turn(f"Which line {question} above? Answer briefly.", upper))
                turns.append(multiple_choice(rng, f"Which line {question} above?", upper, CHART_COLOURS))
        asked = rng.choice(CHART_COLOURS)
        turns.append(Turn(f"Is there a {asked} line? Answer briefly.", "yes" if asked in (first, second) else "no"))
    else:
        count = rng.randint(2, 4)
        letters = rng.sample(("A", "B", "C", "D", "X", "Y", "Z"), count) if rng.random() < 0.5 else list("ABCD"[:count])
        heights = np.array(rng.sample([0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0], count))
        colour = rng.choice(CHART_COLOURS)
        image = draw_chart(
            rng, SIDE, "bar", [Trace(heights=heights, colour=colour)], letters if rng.random() < 0.8 else None
        )
        order = np.argsort(heights)
        places = {0: "first", count - 1: "last"}
        turns = [
            Turn("How many bars are there? Answer briefly.", str(count)),
            Turn("What color are the bars? Answer briefly.", colour),
            Turn("Give the heights.", " ".join(str(round(9 * float(h))) for h in heights)),
        ]
        if (place := places.get(int(order[-1]))) is not None:
            turns.append(Turn("Is the first or the last bar the tallest? Answer briefly.", place))
        turns.append(
            multiple_choice(
                rng, "Counted from the left, which bar is the lowest?", str(int(order[0]) + 1), list("123456")
            )
        )
    rng.shuffle(turns)
    return Scene(image, tuple(turns[:5]))
