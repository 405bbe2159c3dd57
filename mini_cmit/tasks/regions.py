# SPDX-License-Identifier: Apache-2.0
"""States and counties of the US as large coloured shapes: the material of map grounding and of map pretraining.

Source: geographic_boundaries.db of bokeh-sampledata (U.S. Census Bureau, TIGER/Line; free to use with acknowledgement).
The entity of a region is its bare name, "us-region/washington": the state and the 31 counties called Washington share
one pool, so that no name crosses a split.
"""

from __future__ import annotations

import functools
import json
import random
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image
from shapely import from_wkb
from shapely.geometry import MultiPolygon

from mini_cmit.tasks.building import pool_of, rgb, textured_canvas
from mini_cmit.tasks.outlines import Drawing, Outline, Ring, outline
from mini_cmit.tasks.sources import package_file, plain, slug

MAP_COLOURS: Final = ("red", "orange", "yellow", "green", "blue", "purple")
MAP_BACKGROUNDS: Final = ("#f4f1e8", "#e6eef5", "#ffffff", "#e9e9e9", "#edf3e6")
# Boxes live on a grid of 5/100 of the side. A region is stretched by a few percent so that its true box lies on the
# grid: the box is exact, and a model that sees 5 x 5 features has only 18 numbers to choose from.
GRID: Final = 5
FIRST, LAST = 2, 19
# Two cells of this size, from one step off the edge.
CELL, FIRST_CELL = 9, 1


@dataclass(frozen=True, kw_only=True)
class Region:
    entity: str
    name: str
    outline: Outline


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A region, its colour and its box (left, top, right, bottom) in 1/100 of the image side."""

    region: Region
    colour: str
    box: tuple[int, int, int, int]


@functools.cache
def regions(pool: str) -> tuple[Region, ...]:
    """The states and counties of a pool ("pretraining", "train", "validation", "test") whose shape fills its box."""
    path = package_file("bokeh_sampledata", "_data", "geographic_boundaries.db")
    found = []
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        for table in ("us_states", "us_counties"):
            rows = connection.execute(f"SELECT metadata, geometry FROM {table} ORDER BY id")
            for metadata, shape in rows:
                record = json.loads(metadata)
                entity = f"us-region/{slug(record['name'])}"
                if pool_of(entity) != pool:
                    continue
                drawn = outline(_rings(shape))
                # Slivers and archipelagos leave most of their box empty, which no box can be read off.
                if 0.55 <= drawn.aspect <= 1.8 and drawn.fullness >= 0.5:
                    name = record["name"] if table == "us_states" else record["detailed_name"].split(",")[0]
                    found.append(Region(entity=entity, name=plain(name), outline=drawn))
    return tuple(found)


def _rings(shape: bytes) -> list[Ring]:
    geometry = from_wkb(shape)
    parts = geometry.geoms if isinstance(geometry, MultiPolygon) else [geometry]
    return [np.asarray(part.exterior.coords, dtype=np.float64)[:, :2] for part in parts]


def place(rng: random.Random, chosen: Sequence[Region]) -> tuple[Placement, ...]:
    """Boxes that don't overlap, each at least 30 % of the side wide and high, in colours that differ."""
    colours = rng.sample(MAP_COLOURS, len(chosen))
    longest = {1: 11, 2: 10, 3: 8}.get(len(chosen), 7)
    while True:
        boxes: list[tuple[int, int, int, int]] = []
        for region in chosen:
            width, height = _grid_size(region.outline.aspect, rng.randint(max(6, longest - 2), longest))
            left, top = rng.randint(FIRST, LAST - width), rng.randint(FIRST, LAST - height)
            boxes.append((left, top, left + width, top + height))
        if all(_apart(a, b) for index, a in enumerate(boxes) for b in boxes[:index]):
            break
    return tuple(
        Placement(region=region, colour=colour, box=(GRID * box[0], GRID * box[1], GRID * box[2], GRID * box[3]))
        for region, colour, box in zip(chosen, colours, boxes, strict=True)
    )


def place_in_cells(rng: random.Random, chosen: Sequence[Region], colours: Sequence[str]) -> tuple[Placement, ...]:
    """Each region in the middle of its own cell of a 2 x 2 grid, as large as that allows; `colours` in their order."""
    cells = rng.sample([(column, row) for row in range(2) for column in range(2)], len(chosen))
    placements = []
    for region, colour, (column, row) in zip(chosen, colours, cells, strict=True):
        width, height = _grid_size(region.outline.aspect, CELL)
        left = FIRST_CELL + CELL * column + (CELL - width) // 2
        top = FIRST_CELL + CELL * row + (CELL - height) // 2
        box = (GRID * left, GRID * top, GRID * (left + width), GRID * (top + height))
        placements.append(Placement(region=region, colour=colour, box=box))
    return tuple(placements)


def _grid_size(aspect: float, longest: int) -> tuple[int, int]:
    width, height = (longest, longest / aspect) if aspect >= 1 else (longest * aspect, longest)
    return max(6, round(width)), max(6, round(height))


def _apart(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def draw_map(rng: random.Random, side: int, placements: Sequence[Placement]) -> Image.Image:
    """The regions, each in its box, on a pale textured ground."""
    drawing = Drawing(textured_canvas(rng, side, rng.choice(MAP_BACKGROUNDS), strength=6))
    line = rng.choice([(30, 30, 30), (70, 70, 70), (255, 255, 255)])
    for placement in placements:
        left, top, right, bottom = (value / 100 for value in placement.box)
        for ring in placement.region.outline.placed((left, top, right, bottom)):
            drawing.polygon(ring, rgb(placement.colour), line, width=1)
    return drawing.image()
