# SPDX-License-Identifier: Apache-2.0
"""The 1,797 handwritten digits of scikit-learn, by pool.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository (1998),
the 8 x 8 test part that scikit-learn carries. No two of the images are equal, so their index is their entity.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from mini_cmit.tasks.building import pool_of


@dataclass(frozen=True, eq=False)
class Digit:
    """One handwritten digit: its entity ("digit/0042"), its value 0..9 and its ink [8, 8] in 0..1."""

    entity: str
    value: int
    ink: NDArray[np.float64]

    def layer(self, height: int, colour: tuple[int, int, int]) -> Image.Image:
        """The digit cropped to its ink and enlarged to `height` pixels, as an RGBA layer of one colour."""
        columns = np.flatnonzero(self.ink.max(axis=0) > 0.1)
        rows = np.flatnonzero(self.ink.max(axis=1) > 0.1)
        # An empty border pixel on each side keeps the stroke's soft edge after the enlargement.
        crop = np.pad(self.ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1)
        width = max(1, round(height * crop.shape[1] / crop.shape[0]))
        alpha = Image.fromarray(np.rint(crop * 255).astype(np.uint8), "L")
        # Steeper than linear: an 8 x 8 drawing enlarged twelvefold is otherwise a blur.
        large = alpha.resize((width, height), Image.Resampling.BICUBIC).point(
            [min(255, max(0, round((level - 95) * 2.2))) for level in range(256)]
        )
        layer = Image.new("RGBA", (width, height), (*colour, 0))
        layer.putalpha(large)
        return layer


@cache
def _digits() -> tuple[Digit, ...]:
    bunch = load_digits()
    return tuple(
        Digit(entity=f"digit/{index:04d}", value=int(value), ink=image / 16.0)
        for index, (image, value) in enumerate(zip(bunch.images, bunch.target, strict=True))
    )


def digit_images(pool: str) -> tuple[Digit, ...]:
    """The digits of one pool ("pretraining", "train", "validation" or "test"), in the order of their index."""
    return tuple(digit for digit in _digits() if pool_of(digit.entity) == pool)
