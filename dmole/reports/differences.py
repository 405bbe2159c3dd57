# SPDX-License-Identifier: Apache-2.0
"""What `verify` has checked and found: stored numbers that are not what their sources give."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One number that is not what its sources give."""

    file: str
    cell: str
    stored: str
    recomputed: str

    def __str__(self) -> str:
        return f"{self.file}: {self.cell}: stored {self.stored}, recomputed {self.recomputed}"


@dataclass
class Verification:
    """What was checked, and what was found."""

    runs: int = 0
    scores: int = 0
    aggregates: int = 0
    not_measured: int = 0
    """Cells of the matrix that the settings of the evaluation left out: there is nothing to verify in them."""
    without_model: int = 0
    """Runs whose folder has no model/ any more, which holds no number of a table."""
    differences: list[Difference] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        checked = f"{self.runs} runs, {self.scores} scores from raw predictions, {self.aggregates} aggregates"
        if self.not_measured:
            checked += f", {self.not_measured} cells not measured"
        if self.without_model:
            checked += f", {self.without_model} runs without their model"
        if self.ok:
            return f"verified {checked}: all as stored"
        count = len(self.differences)
        return "\n".join([*map(str, self.differences), f"checked {checked}: {count} difference{'s' * (count != 1)}"])


def _same(stored: Any, expected: Any) -> bool:
    if isinstance(stored, bool) or isinstance(expected, bool):
        return stored is expected
    if isinstance(stored, int | float) and isinstance(expected, int | float):
        return math.isclose(stored, expected, rel_tol=0.0, abs_tol=TOLERANCE)
    return bool(stored == expected)


def expect(report: Verification, file: str, cell: str, stored: Any, expected: Any, *, missing: str = "nothing") -> None:
    if not _same(stored, expected):
        shown = [missing if value is None else str(value) for value in (stored, expected)]
        report.differences.append(Difference(file=file, cell=cell, stored=shown[0], recomputed=shown[1]))


def expect_tree(report: Verification, file: str, name: str, stored: Any, expected: Any) -> None:
    """Compare two nested mappings leaf by leaf."""
    if isinstance(expected, Mapping) and isinstance(stored, Mapping):
        for key in dict.fromkeys([*expected, *stored]):
            expect_tree(report, file, f"{name}.{key}", stored.get(key), expected.get(key))
        return
    expect(report, file, name, stored, expected)
