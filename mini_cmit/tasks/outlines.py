# SPDX-License-Identifier: Apache-2.0
"""Polygons of longitude and latitude, projected and drawn large.

    k = sqrt(2 / (1 + sin p0 sin p + cos p0 cos p cos(l - l0)))
    x = k cos p sin(l - l0)        y = -k (cos p0 sin p - sin p0 cos p cos(l - l0))

with longitude l, latitude p and the centre (l0, p0): Lambert's azimuthal equal-area projection (Snyder, Map
Projections, 1987, eq. 24-2 to 24-4). Every region is projected about its own centre, so high latitudes keep their
shape; y points down, as pixels do.

Legend: N points of a ring; a ring is float64 [N, 2].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Ring = npt.NDArray[np.float64]
RGB = tuple[int, int, int]
Box = tuple[float, float, float, float]

# Drawn at three times the side and averaged down: PIL's polygons aren't anti-aliased.
SUPERSAMPLE: Final = 3


def project(ring_N2: Ring, centre: tuple[float, float]) -> Ring:
    """Longitude and latitude in degrees to the plane; the centre becomes (0, 0). The antimeridian needs no care."""
    longitude, latitude = np.radians(ring_N2).T
    longitude_0, latitude_0 = np.radians(centre)
    sin, cos, sin_0, cos_0 = np.sin(latitude), np.cos(latitude), np.sin(latitude_0), np.cos(latitude_0)
    delta = longitude - longitude_0
    scale = np.sqrt(2 / np.maximum(1 + sin_0 * sin + cos_0 * cos * np.cos(delta), 1e-9))
    x = scale * cos * np.sin(delta)
    y = -scale * (cos_0 * sin - sin_0 * cos * np.cos(delta))
    return np.stack([x, y], axis=1)


def ring_area(ring_N2: Ring) -> float:
    """Shoelace formula."""
    x, y = ring_N2.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def ring_centre(ring_N2: Ring) -> tuple[float, float]:
    """Middle of the bounding box, which is what has to end up in the middle of the drawing."""
    low, high = ring_N2.min(axis=0), ring_N2.max(axis=0)
    middle = (low + high) / 2
    return float(middle[0]), float(middle[1])


@dataclass(frozen=True, kw_only=True, eq=False)
class Outline:
    """A projected region. Rings keep the projection's units; `low` and `size` are their bounding box.

    Compared by identity (eq=False): arrays have no hash, and regions and countries are keys of caches.
    """

    rings: tuple[Ring, ...]
    centre: tuple[float, float]
    low: tuple[float, float]
    size: tuple[float, float]
    fullness: float

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.size[0] / self.size[1]

    def placed(self, box: Box) -> tuple[Ring, ...]:
        """The rings stretched so that their bounding box is exactly `box` (left, top, right, bottom)."""
        left, top, right, bottom = box
        scale = np.array([(right - left) / self.size[0], (bottom - top) / self.size[1]])
        return tuple((ring - np.array(self.low)) * scale + np.array([left, top]) for ring in self.rings)


def outline(rings: Sequence[Ring]) -> Outline:
    """Projects a region about its main part; far parts (Alaska, Hawaii, French Guiana) and specks are left out.

    `fullness` is the area over the area of the bounding box: low for archipelagos and slivers.
    """
    main = max(rings, key=ring_area)
    centre = ring_centre(main)
    projected = sorted((project(ring, centre) for ring in rings), key=ring_area, reverse=True)
    low, high = projected[0].min(axis=0), projected[0].max(axis=0)
    reach = 0.35 * (high - low)
    largest = ring_area(projected[0])
    kept = [
        ring
        for ring in projected
        if ring_area(ring) >= 0.01 * largest
        and bool(np.all(np.array(ring_centre(ring)) >= low - reach))
        and bool(np.all(np.array(ring_centre(ring)) <= high + reach))
    ]
    points = np.concatenate(kept)
    low, high = points.min(axis=0), points.max(axis=0)
    width, height = (float(value) for value in high - low)
    return Outline(
        rings=tuple(kept),
        centre=centre,
        low=(float(low[0]), float(low[1])),
        size=(width, height),
        fullness=sum(ring_area(ring) for ring in kept) / (width * height),
    )


class Drawing:
    """A supersampled square canvas; coordinates are fractions of the side, line widths are pixels of the result."""

    def __init__(self, background: Image.Image) -> None:
        self.side = background.width
        self._large = background.resize((self.side * SUPERSAMPLE,) * 2, Image.Resampling.NEAREST)
        self._draw = ImageDraw.Draw(self._large)

    def polygon(self, ring_N2: Ring, fill: RGB | None, line: RGB | None = None, width: float = 1.5) -> None:
        points = self._points(ring_N2)
        if fill is not None:
            self._draw.polygon(points, fill=fill)
        if line is not None:
            self._draw.line([*points, *points[:2]], fill=line, width=self._width(width), joint="curve")

    def path(self, points_N2: Ring, line: RGB, width: float) -> None:
        points = self._points(points_N2)
        self._draw.line(points, fill=line, width=self._width(width), joint="curve")
        radius = self._width(width) / 2
        for x, y in (points[0], points[-1]):
            self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=line)

    def disc(self, x: float, y: float, radius: float, fill: RGB) -> None:
        scale = self.side * SUPERSAMPLE
        reach = radius * SUPERSAMPLE
        self._draw.ellipse((x * scale - reach, y * scale - reach, x * scale + reach, y * scale + reach), fill=fill)

    def rectangle(self, box: Box, fill: RGB) -> None:
        scale = self.side * SUPERSAMPLE
        self._draw.rectangle((box[0] * scale, box[1] * scale, box[2] * scale - 1, box[3] * scale - 1), fill=fill)

    def image(self) -> Image.Image:
        return self._large.reduce(SUPERSAMPLE)

    def _points(self, points_N2: Ring) -> list[tuple[float, float]]:
        scale = self.side * SUPERSAMPLE
        return [(float(x) * scale, float(y) * scale) for x, y in points_N2]

    def _width(self, width: float) -> int:
        return max(1, round(width * SUPERSAMPLE))
