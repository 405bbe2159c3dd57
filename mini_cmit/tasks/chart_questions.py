# SPDX-License-Identifier: Apache-2.0
"""Task 7, chart questions (the form of VizWiz-VQA): ten annotators, some "unanswerable"; metric soft VQA accuracy.

Three questions: the trend of a line, the tallest bar, the line that ends higher. A question is unanswerable where the
chart lacks what it asks about: no letters below the bars, or one line where two were to be compared, or no line of the
named colour. The ten answers are a clear majority and a few variants, chosen by the sample's own random numbers.
Series are disjoint from those of chart captions.
"""

from __future__ import annotations

import random
from typing import Final

import numpy as np
from PIL import Image

from mini_cmit.tasks.building import BuildContext, Drawn, TaskRows, build_task, short_answer
from mini_cmit.tasks.charts import (
    CHART_COLOURS,
    SHORTEST,
    SIDES,
    Series,
    Trace,
    Trend,
    Values,
    curve_with,
    draw_chart,
    resampled,
    series,
)

NAME: Final = "chart_questions"
METRIC: Final = "vqa"
PART: Final = 1
UNANSWERABLE: Final = "unanswerable"
ANNOTATORS: Final = 10
# Not A, B, C: the normalisation of VQA drops the article "a", and with it the whole answer.
BAR_LETTERS: Final = ("X", "Y", "Z")

TREND_ANSWERS: Final[dict[Trend, tuple[str, ...]]] = {
    "rise": ("rising", "up", "increasing"),
    "fall": ("falling", "down", "decreasing"),
    "peak": ("up then down", "rises then falls", "peak"),
    "dip": ("down then up", "falls then rises", "valley"),
}


def annotators(rng: random.Random, answer: str, variants: tuple[str, ...]) -> tuple[str, ...]:
    """Ten answers: `answer` first and six to eight times, the rest one of its variants each."""
    agreeing = rng.randint(6, 8) if variants else ANNOTATORS
    return (answer,) * agreeing + tuple(rng.choice(variants) for _ in range(ANNOTATORS - agreeing))


def _unanswerable(rng: random.Random, guesses: tuple[str, ...]) -> tuple[str, ...]:
    """Most annotators say so; one or two guess all the same, as people do."""
    return annotators(rng, UNANSWERABLE, (*guesses, UNANSWERABLE, "not shown"))


def _trend(rng: random.Random, candidates: tuple[Series, ...], side: int) -> Drawn:
    trend = rng.choice(tuple(TREND_ANSWERS))
    drawn = curve_with(rng, candidates, trend, rng.randint(8, 14), rng.choice(SIDES[trend]))
    colour = rng.choice(CHART_COLOURS)
    image = draw_chart(rng, side, "line", [Trace(heights=drawn.heights, colour=colour)])
    if rng.random() < 0.2:
        asked = rng.choice([other for other in CHART_COLOURS if other != colour])
        answers = _unanswerable(rng, TREND_ANSWERS[trend][:1])
    else:
        asked = colour
        majority, *variants = TREND_ANSWERS[trend]
        answers = annotators(rng, majority, tuple(variants))
    return _drawn(image, f"What is the trend of the {asked} line?", answers, drawn.entity)


def _tallest(rng: random.Random, candidates: tuple[Series, ...], side: int) -> Drawn:
    letters = BAR_LETTERS
    wanted = rng.randrange(len(letters))
    while True:
        one = rng.choice(candidates)
        heights = _three_heights(rng, one)
        others = np.delete(heights, wanted)
        if float(heights[wanted]) - float(others.max()) >= 0.2:
            break
    colour = rng.choice(CHART_COLOURS)
    labelled = rng.random() >= 0.25
    trace = Trace(heights=heights, colour=colour)
    image = draw_chart(rng, side, "bar", [trace], letters if labelled else None)
    lower = letters[wanted].lower()
    if labelled:
        answers = annotators(rng, letters[wanted], (lower, f"bar {lower}"))
    else:
        answers = _unanswerable(rng, (letters[wanted],))
    return _drawn(image, "Which bar is the tallest?", answers, one.entity)


def _three_heights(rng: random.Random, one: Series) -> Values:
    """Three values of the series, in their order, over the largest; scaled so that the lowest stays visible."""
    values = np.asarray(one.values)
    chosen = values[sorted(rng.sample(range(len(values)), 3))]
    span = float(np.ptp(chosen))
    return np.asarray(0.2 + 0.8 * (chosen - chosen.min()) / span if span > 0 else np.ones(3), dtype=np.float64)


def _higher(rng: random.Random, candidates: tuple[Series, ...], side: int) -> Drawn:
    question = "Which line is higher at the end?"
    first, second = rng.sample(CHART_COLOURS, 2)
    if rng.random() < 0.2:
        trend = rng.choice(tuple(TREND_ANSWERS))
        drawn = curve_with(rng, candidates, trend, rng.randint(8, 14))
        image = draw_chart(rng, side, "line", [Trace(heights=drawn.heights, colour=first)])
        return _drawn(image, question, _unanswerable(rng, (first,)), drawn.entity)
    entities, heights = _two_lines(rng, candidates)
    traces = [Trace(heights=heights[0], colour=first), Trace(heights=heights[1], colour=second)]
    higher = first if heights[0][-1] > heights[1][-1] else second
    rng.shuffle(traces)
    image = draw_chart(rng, side, "line", traces)
    return _drawn(image, question, annotators(rng, higher, (f"the {higher} one", f"{higher} line")), *entities)


def _two_lines(rng: random.Random, candidates: tuple[Series, ...]) -> tuple[tuple[str, ...], tuple[Values, Values]]:
    """Two series of one quantity on one axis, whose ends are at least 0.35 of the axis apart."""
    points = rng.randint(8, 14)
    while True:
        one = rng.choice(candidates)
        same = [other for other in candidates if other.quantity == one.quantity and other.entity != one.entity]
        if not same:
            continue
        two = rng.choice(same)
        length = min(len(one.values), len(two.values))
        if length < SHORTEST:
            continue
        lines = np.stack([resampled(np.asarray(s.values[-length:]), points) for s in (one, two)])
        span = float(np.ptp(lines))
        if span <= 0:
            continue
        heights = (lines - lines.min()) / span
        if abs(float(heights[0, -1] - heights[1, -1])) >= 0.35:
            return (one.entity, two.entity), (heights[0], heights[1])


def _drawn(image: Image.Image, question: str, answers: tuple[str, ...], *entities: str) -> Drawn:
    return Drawn(image=image, instruction=short_answer(question), answers=answers, entities=entities)


KINDS: Final = (_trend, _tallest, _higher)


def draw(rng: random.Random, pool: str, side: int) -> Drawn:
    """One of the three kinds of question, equally often."""
    return rng.choice(KINDS)(rng, series(pool, PART), side)


def build(context: BuildContext) -> TaskRows:
    """The rows of the task; its images are written below `context.root`."""
    return build_task(context, NAME, METRIC, draw)
