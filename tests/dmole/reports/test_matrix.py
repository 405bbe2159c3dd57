# SPDX-License-Identifier: Apache-2.0
"""The picture of a matrix is a real PNG, the same for the same numbers."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmole.reports.matrix import save_matrix_picture

TASKS = ("icon_captions", "map_grounding")
MATRIX = np.array([[3.0, 0.0], [240.0, 1.0], [math.nan, 80.0]])


def test_a_picture_is_written_and_repeats(tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        save_matrix_picture(tmp_path / "new" / name, MATRIX, TASKS, title="dmole-seed0")
    with Image.open(tmp_path / "new" / "one.png") as image:
        image.load()
        assert image.format == "PNG" and image.width > 300 and len(image.convert("RGB").getcolors(1 << 20) or []) > 20
    assert (tmp_path / "new" / "one.png").read_bytes() == (tmp_path / "new" / "two.png").read_bytes()


def test_all_zero_and_unmeasured_columns_are_drawn(tmp_path: Path) -> None:
    save_matrix_picture(tmp_path / "p.png", np.array([[0.0, math.nan], [0.0, math.nan], [0.0, math.nan]]), TASKS)
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_names_must_fit_the_columns(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tasks has 1 names; expected 2, one per column"):
        save_matrix_picture(tmp_path / "p.png", MATRIX, TASKS[:1])


def test_a_picture_of_many_tasks_keeps_its_size(tmp_path: Path) -> None:
    sizes = []
    for count in (41, 300):
        path = tmp_path / f"{count}.png"
        save_matrix_picture(path, np.ones((count + 1, count)), [f"t{number}" for number in range(count)])
        with Image.open(path) as image:
            sizes.append(image.size)
    assert sizes[0] == sizes[1] and sizes[0][0] < 5000
