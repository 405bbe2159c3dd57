# SPDX-License-Identifier: Apache-2.0
"""Real time series and the charts drawn of them: the material of both chart tasks and of chart pretraining.

Only series whose terms allow redistribution with credit are read (see `series`). The entity is one series, for example
"series/emissions/france"; a chart shows a window of it, resampled to a few points and scaled to the plot.

Legend: N points of a chart, left to right, as fractions of the plot's height (0 bottom, 1 top).
"""

from __future__ import annotations

import functools
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from mini_cmit.tasks.building import part_of, pool_of, rgb, textured_canvas
from mini_cmit.tasks.outlines import RGB, Drawing
from mini_cmit.tasks.sources import package_file, read_table, slug

Trend = Literal["rise", "fall", "peak", "dip", "zigzag"]
Side = Literal["left", "middle", "right"]
Kind = Literal["line", "bar", "area", "dot"]

TRENDS: Final[tuple[Trend, ...]] = ("rise", "fall", "peak", "dip", "zigzag")
KINDS: Final[tuple[Kind, ...]] = ("line", "bar", "area", "dot")
CHART_COLOURS: Final = ("red", "orange", "green", "blue", "purple", "black")
CHART_BACKGROUNDS: Final = ("#ffffff", "#f6f3ea", "#eef3f8", "#f2f2f2", "#eff5ec")
# The plot inside the image: left, top, right, bottom as fractions of the side.
PLOT: Final = (0.09, 0.07, 0.95, 0.90)
SHORTEST: Final = 8
# Where the highest point of a trend can be; sides that a trend rules out would be noise of a near tie.
SIDES: Final[dict[Trend, tuple[Side, ...]]] = {
    "rise": ("right",),
    "fall": ("left",),
    "peak": ("left", "middle", "right"),
    "dip": ("left", "right"),
    "zigzag": ("left", "middle", "right"),
}

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One real series. Series of one `quantity` share a unit, so they may share an axis."""

    entity: str
    quantity: str
    values: tuple[float, ...]


@functools.cache
def series(pool: str, part: int | None = None) -> tuple[Series, ...]:
    """The series of a pool ("pretraining", "train", "validation", "test").

    `part` 0 belongs to chart captions and 1 to chart questions; None gives both (pretraining).

    Sources, by package. bokeh-sampledata: Gapminder (CC-BY-2.0), UN World Population Prospects (CC-BY-3.0-IGO), CO2
    emissions, stock prices, degrees of women (CC0), marriages, unemployment, Lincoln weather, sea temperature.
    vega-datasets: Seattle weather and hourly temperatures (NOAA), US employment, Iowa electricity. statsmodels: CO2 of
    Mauna Loa, El Nino, sunspots, Nile, US macro-economy. The others are in the public domain or free to use.
    """
    return tuple(
        one
        for one in _all_series()
        if pool_of(one.entity) == pool and (part is None or part_of(one.entity, "charts", 2) == part)
    )


@functools.cache
def _all_series() -> tuple[Series, ...]:
    unique: dict[str, Series] = {}
    for quantity, name, values in _tables():
        usable = np.asarray(values, dtype=np.float64)
        if len(usable) >= SHORTEST and np.all(np.isfinite(usable)) and np.ptp(usable) > 0:
            entity = f"series/{quantity}/{slug(name)}"
            unique.setdefault(entity, Series(entity=entity, quantity=quantity, values=tuple(usable.tolist())))
    return tuple(unique.values())


def _tables() -> Iterator[tuple[str, str, Sequence[float]]]:
    """(quantity, name, values) of every source, in a fixed order."""
    bokeh = functools.partial(read_table, "bokeh_sampledata", "_data")
    rows = bokeh("gapminder.csv.gz")
    for column in ("fertility", "life_expectancy", "population"):
        yield from _grouped(column, rows, "country", column)
    yield from _grouped("emissions", bokeh("emissions.csv.gz"), "country", "emissions")
    ages: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in bokeh("population.csv.gz"):
        if row["AgeGrp"] in ("0-4", "20-24", "50-54"):
            ages[f"aged {row['AgeGrp']}", row["Location"]][row["Year"]] += float(row["Value"])
    for (quantity, place), years in ages.items():
        yield slug(quantity), place, list(years.values())
    yield from _windows("price", bokeh("stocks.csv.gz"), ("Ticker",), "Date", 7, "Adj Close")
    yield from _columns("degrees", bokeh("percent-bachelors-degrees-women-usa.csv"), "Year")
    yield from _columns("marriages", bokeh("us_marriages_divorces.csv"), "Year")
    for row in bokeh("unemployment1948.csv"):
        months = [row[month] for month in list(row)[1:13]]
        yield from _one("unemployment", row["Year"], months)
    yield from _windows("sea", bokeh("sea_surface_temperature.csv.gz"), (), "time (UTC)", 10, "temperature (celsius)")
    yield from _windows("lincoln", bokeh("lincoln_weather.csv"), (), "DATE", 7, "TMAX")
    vega = functools.partial(read_table, "vega_datasets", "_data")
    rows = vega("seattle-weather.csv")
    for column in ("precipitation", "temp_max", "wind"):
        yield from _windows(f"seattle-{column}", rows, (), "date", 7, column)
    # Every third day: a hundred daily temperature curves are plenty of one shape.
    yield from list(_windows("hourly", vega("seattle-temps.csv"), (), "date", 10, "temp"))[::3]
    yield from _columns("employment", vega("us-employment.csv"), "month")
    yield from _grouped("electricity", vega("iowa-electricity.csv"), "source", "net_generation")
    models = functools.partial(read_table, "statsmodels", "datasets")
    yield from _windows("co2", models("co2", "co2.csv"), (), "date", 4, "co2")
    for row in models("elnino", "elnino.csv"):
        yield from _one("elnino", row["YEAR"], list(row.values())[1:])
    spots = [float(row["SUNACTIVITY"]) for row in models("sunspots", "sunspots.csv")]
    for start in range(0, len(spots) - 16, 16):
        yield "sunspots", f"{1700 + start}", spots[start : start + 16]
    yield from _columns("nile", models("nile", "nile.csv"), "year")
    yield from _columns("macro", models("macrodata", "macrodata.csv"), "year")


def _one(quantity: str, name: str, texts: Iterable[str]) -> Iterator[tuple[str, str, list[float]]]:
    """One series, unless a value is missing: a gap would have to be drawn, and told."""
    values = list(texts)
    if all(values):
        yield quantity, name, [float(text) for text in values]


def _grouped(
    quantity: str, rows: Sequence[dict[str, str]], key: str, column: str
) -> Iterator[tuple[str, str, list[float]]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        groups[row[key]].append(row[column])
    for name, values in groups.items():
        yield from _one(quantity, name, values)


def _columns(quantity: str, rows: Sequence[dict[str, str]], index: str) -> Iterator[tuple[str, str, list[float]]]:
    for column in rows[0]:
        if column not in (index, "quarter"):
            yield from _one(quantity, column, [row[column] for row in rows if row[column]])


def _windows(
    quantity: str, rows: Sequence[dict[str, str]], keys: tuple[str, ...], time: str, prefix: int, column: str
) -> Iterator[tuple[str, str, list[float]]]:
    """One series per distinct start of the time text: 4 characters give years, 7 months, 10 days."""
    groups: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        groups[" ".join([*(row[key] for key in keys), row[time][:prefix]])].append(row[column])
    for name, values in groups.items():
        yield from _one(quantity, name, values)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A window of a series as it is drawn: `heights` in 0..1, the clear trend, and where its highest point is."""

    entity: str
    heights: Values
    trend: Trend
    highest: Side


def resampled(values: Values, points: int) -> Values:
    """Means over equal pieces, or interpolation where there are fewer than two values per point."""
    if len(values) >= 2 * points:
        edges = np.arange(points + 1) * len(values) // points
        means: Values = np.add.reduceat(values, edges[:-1]) / (edges[1:] - edges[:-1])
        return means
    places = np.arange(points) * ((len(values) - 1) / (points - 1))
    between: Values = np.interp(places, np.arange(len(values)), values)
    return between


def trend_of(heights: Values) -> Trend | None:
    """The trend of heights in 0..1, or None where two people might disagree.

    rise, fall: ends at least 0.7 apart and under 0.25 of movement the other way. peak, dip: the turn is inside, 0.45
    or more away from both ends, and under 0.25 of movement against it. zigzag: at least 3 heights of movement in all.
    """
    steps = heights[1:] - heights[:-1]
    rise = float(heights[-1] - heights[0])
    movement = float(np.abs(steps).sum())
    up, down = (movement + rise) / 2, (movement - rise) / 2
    if rise >= 0.7 and down <= 0.25:
        return "rise"
    if -rise >= 0.7 and up <= 0.25:
        return "fall"
    if _turns(heights):
        return "peak"
    if _turns(1 - heights):
        return "dip"
    if movement >= 3 and abs(rise) <= 0.6:
        return "zigzag"
    return None


def _turns(heights: Values) -> bool:
    top = int(heights.argmax())
    last = len(heights) - 1
    first, end, highest = float(heights[0]), float(heights[-1]), float(heights[top])
    if not 0.2 * last <= top <= 0.8 * last or max(first, end) > highest - 0.45:
        return False
    movement = float(np.abs(heights[1:] - heights[:-1]).sum())
    # Half of the movement in excess of one clean turn went the wrong way.
    return (movement - (highest - first) - (highest - end)) / 2 <= 0.25


def highest_side(heights: Values) -> Side | None:
    """Third of the chart that holds the highest point; None near a border, or where another third comes close."""
    position = int(heights.argmax()) / (len(heights) - 1)
    thirds: tuple[tuple[Side, float, float], ...] = (("left", 0, 0.3), ("middle", 0.36, 0.64), ("right", 0.7, 1))
    places = np.linspace(0, 1, len(heights))
    for side, low, high in thirds:
        if low <= position <= high:
            others = heights[(places < low - 0.12) | (places > high + 0.12)]
            return side if len(others) == 0 or float(others.max()) <= 0.88 * float(heights.max()) else None
    return None


def curve(rng: random.Random, one: Series, points: int) -> Curve | None:
    """A random window of the series as drawn, or None where it has no clear trend or highest point."""
    values = np.asarray(one.values)
    length = rng.randint(max(SHORTEST, round(0.5 * len(values))), len(values))
    start = rng.randint(0, len(values) - length)
    drawn = resampled(values[start : start + length], points)
    low, high = float(drawn.min()), float(drawn.max())
    if high <= low:
        return None
    heights = (drawn - low) / (high - low)
    trend = trend_of(heights)
    if trend is None:
        return None
    highest = highest_side(heights)
    if highest is None or highest not in SIDES[trend]:
        return None
    return Curve(entity=one.entity, heights=heights, trend=trend, highest=highest)


def curve_with(
    rng: random.Random, candidates: Sequence[Series], trend: Trend, points: int, highest: Side | None = None
) -> Curve:
    """A curve of the wanted trend (and side of its highest point), drawn from the candidates.

    Raises:
        ValueError: no window with that trend was found, because the candidates are too few.
    """
    for _ in range(20_000):
        found = curve(rng, rng.choice(candidates), points)
        if found is not None and found.trend == trend and (highest is None or found.highest == highest):
            return found
    raise ValueError(
        f"no window of {len(candidates)} series has trend {trend!r} with its highest point at {highest!r} "
        f"when drawn with {points} points. Pass more series, 8 points or more, or a side that SIDES allows."
    )


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What is drawn in one colour."""

    heights: Values
    colour: str


def draw_chart(
    rng: random.Random, side: int, kind: Kind, traces: Sequence[Trace], labels: Sequence[str] | None = None
) -> Image.Image:
    """A chart with thick marks on a pale ground; `labels` go below the bars, one each, None leaves them out."""
    drawing = Drawing(textured_canvas(rng, side, rng.choice(CHART_BACKGROUNDS), strength=4))
    left, top, right, bottom = PLOT
    bottom = bottom if labels is None else bottom - 0.11
    gridlines = rng.choice((0, 2, 3, 4))
    for line in range(gridlines):
        y = top + (bottom - top) * line / gridlines
        drawing.path(np.array([[left, y], [right, y]]), (205, 205, 205), 1)
    width = rng.uniform(4.5, 6.5) * side / 160
    for trace in traces:
        _draw_trace(drawing, kind, trace, (left, top, right, bottom), width)
    axis: RGB = rng.choice([(40, 40, 40), (90, 90, 90), (20, 20, 60)])
    drawing.path(np.array([[left, top], [left, bottom], [right, bottom]]), axis, 2)
    image = drawing.image()
    if labels is not None:
        _write_labels(image, labels, bottom)
    return image


def _draw_trace(
    drawing: Drawing, kind: Kind, trace: Trace, plot: tuple[float, float, float, float], width: float
) -> None:
    left, top, right, bottom = plot
    colour = rgb(trace.colour)
    # Lines keep clear of the axes; bars and areas stand on the lower one.
    floor, ceiling = bottom - (0.04 if kind in ("line", "dot") else 0.0), top + 0.04
    ys = floor - (floor - ceiling) * trace.heights
    count = len(ys)
    if kind == "bar":
        slot = (right - left) / count
        for index, y in enumerate(ys):
            x = left + slot * index
            drawing.rectangle((x + 0.14 * slot, min(float(y), bottom - 0.02), x + 0.86 * slot, bottom), colour)
        return
    xs = np.linspace(left + 0.05, right - 0.04, count)
    points = np.stack([xs, ys], axis=1)
    if kind == "line":
        drawing.path(points, colour, width)
    elif kind == "dot":
        for x, y in points:
            drawing.disc(float(x), float(y), 0.9 * width, colour)
    else:
        drawing.polygon(np.concatenate([[[xs[0], bottom]], points, [[xs[-1], bottom]]]), colour)


def _write_labels(image: Image.Image, labels: Sequence[str], bottom: float) -> None:
    side = image.width
    font = ImageFont.truetype(
        str(package_file("matplotlib", "mpl-data", "fonts", "ttf", "DejaVuSans-Bold.ttf")),
        round(0.14 * side),
        layout_engine=ImageFont.Layout.BASIC,
    )
    draw = ImageDraw.Draw(image)
    slot = (PLOT[2] - PLOT[0]) / len(labels)
    for index, label in enumerate(labels):
        x = PLOT[0] + slot * (index + 0.5)
        draw.text((x * side, (bottom + 1) / 2 * side), label, fill=(20, 20, 20), font=font, anchor="mm")
