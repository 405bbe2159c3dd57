# SPDX-License-Identifier: Apache-2.0
"""Outlines and facts of countries: the material of country knowledge and of country pretraining.

Source: countryinfo (MIT) for name, capital, world region and outline. Its outlines are world.geo.json (public domain),
which are Natural Earth's 1:110m countries (public domain) rounded to six digits. 24 countries belong to the task, six
of each world region; all other large ones are "pretraining".
"""

from __future__ import annotations

import functools
import json
import random
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image

from mini_cmit.tasks.building import PRETRAINING, rgb, textured_canvas
from mini_cmit.tasks.outlines import Drawing, Outline, Ring, outline, project, ring_area, ring_centre
from mini_cmit.tasks.sources import package_file, plain, slug

# Large, recognisable outlines with capitals of one plain word, six of each region so that no region is a good guess.
TASK_COUNTRIES: Final = {
    "Africa": ("Egypt", "Kenya", "Madagascar", "Mali", "Namibia", "Nigeria"),
    "Americas": ("Bolivia", "Brazil", "Canada", "Chile", "Cuba", "Peru"),
    "Asia": ("Iran", "Japan", "Mongolia", "Saudi Arabia", "Thailand", "Turkey"),
    "Europe": ("France", "Germany", "Italy", "Norway", "Poland", "Spain"),
}
# Its sovereignty is disputed, so no single fact of the package is taught about it.
LEFT_OUT: Final = ("Western Sahara",)
FILLS: Final = ("red", "orange", "green", "blue", "purple", "brown", "pink", "black")
GROUNDS: Final = ("#ffffff", "#f4f1e8", "#dfeaf3", "#e4e4e4", "#e6f0df", "#fbeedd")
ZOOMS: Final = (0.70, 0.76, 0.82, 0.88)
SHIFTS: Final = (-1, 0, 1)
STEP: Final = 0.03


@dataclass(frozen=True, kw_only=True)
class Country:
    entity: str
    name: str
    capital: str
    region: str
    outline: Outline


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """Every choice of a drawing; its `entity` decides the split of the sample, as the country can't."""

    country: Country
    fill: str
    ground: str
    zoom: float
    shift: tuple[int, int]
    neighbours: bool

    @property
    def entity(self) -> str:
        across, down = self.shift
        extent = f"zoom-{round(100 * self.zoom)}/shift{across:+d}{down:+d}/{'world' if self.neighbours else 'alone'}"
        return f"rendering/{slug(self.country.name)}/{self.fill}-on-{self.ground.lstrip('#')}/{extent}"


@functools.cache
def countries(pool: str) -> tuple[Country, ...]:
    """The 24 countries of the task (the same for "train", "validation", "test"), or the others for "pretraining"."""
    wanted = {name for names in TASK_COUNTRIES.values() for name in names}
    return tuple(one for one in _all_countries() if (one.name in wanted) == (pool != PRETRAINING))


@functools.cache
def _all_countries() -> tuple[Country, ...]:
    found = []
    for path in sorted(package_file("countryinfo", "__init__.py").parent.glob("data/*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        rings = _rings(record)
        # Under 40,000 square kilometres the 1:110m outline has too few points to be told by.
        if rings and (record.get("area") or 0) >= 40_000 and record.get("capital") and record.get("region"):
            name = plain(record["name"])
            if name in LEFT_OUT:
                continue
            found.append(
                Country(
                    entity=f"country/{slug(name)}",
                    name=name,
                    capital=plain(record["capital"]),
                    region=record["region"],
                    outline=outline(rings),
                )
            )
    return tuple(found)


def _rings(record: dict[str, object]) -> list[Ring]:
    collection = record.get("geoJSON")
    if not isinstance(collection, dict):
        return []
    rings = []
    for feature in collection.get("features", []):
        shape = feature["geometry"]
        polygons = shape["coordinates"] if shape["type"] == "MultiPolygon" else [shape["coordinates"]]
        rings += [np.asarray(polygon[0], dtype=np.float64) for polygon in polygons]
    return rings


@functools.cache
def _world() -> tuple[Ring, ...]:
    """The rings of every country in degrees, for the faint surroundings."""
    rings: list[Ring] = []
    for path in sorted(package_file("countryinfo", "__init__.py").parent.glob("data/*.json")):
        rings += _rings(json.loads(path.read_text(encoding="utf-8")))
    return tuple(rings)


@functools.cache
def _surroundings(country: Country) -> tuple[Ring, ...]:
    """The rings near a country in the country's own projection."""
    low, size = np.array(country.outline.low), np.array(country.outline.size)
    reach = 0.8 * float(size.max())
    near = []
    for ring in _world():
        # Past 60 degrees away the projection stretches rings over the whole plane.
        longitude, latitude = ring_centre(ring)
        if np.cos(np.radians(longitude - country.outline.centre[0])) < 0.5:
            continue
        if abs(latitude - country.outline.centre[1]) > 60:
            continue
        drawn = project(ring, country.outline.centre)
        if np.all(drawn.max(axis=0) > low - reach) and np.all(drawn.min(axis=0) < low + size + reach):
            near.append(drawn)
    return tuple(sorted(near, key=ring_area, reverse=True))


def random_rendering(rng: random.Random, country: Country) -> Rendering:
    return Rendering(
        country=country,
        fill=rng.choice(FILLS),
        ground=rng.choice(GROUNDS),
        zoom=rng.choice(ZOOMS),
        shift=(rng.choice(SHIFTS), rng.choice(SHIFTS)),
        neighbours=rng.random() < 0.4,
    )


def draw_country(rng: random.Random, side: int, rendering: Rendering) -> Image.Image:
    """The country large and filled, alone or among faint neighbours; north is up."""
    shape = rendering.country.outline
    drawing = Drawing(textured_canvas(rng, side, rendering.ground, strength=4))
    scale = rendering.zoom / max(shape.size)
    middle = np.array(shape.low) + np.array(shape.size) / 2
    target = 0.5 + STEP * np.array(rendering.shift)

    def placed(ring_N2: Ring) -> Ring:
        moved: Ring = (ring_N2 - middle) * scale + target
        return moved

    if rendering.neighbours:
        for ring in _surroundings(rendering.country):
            drawing.polygon(placed(ring), None, (178, 178, 178), width=1)
    for ring in shape.rings:
        drawing.polygon(placed(ring), rgb(rendering.fill), (20, 20, 20), width=1)
    return drawing.image()
