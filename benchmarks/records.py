# SPDX-License-Identifier: Apache-2.0
"""A measurement as one CSV row that names its machine, its versions and its commit."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Row:
    """Empty fields are "": a base layer has no overhead, a phase of a training step no peak fraction.

    `peak_fraction`: flops the case needs (base product and active experts) / p50 / the GEMM peak measured in the same
    run with this dtype and number of threads. `overhead_over_floor`: (p50 - base's p50) / max(needed flops / peak,
    needed bytes / bandwidth), flops and bytes of what the op adds to its base.
    """

    case: str
    dtype: str
    direction: str
    threads: int
    provider: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    peak_memory_mib: float | str
    peak_fraction: float | str
    overhead_over_floor: float | str
    machine: str
    versions: str
    commit: str


COLUMNS = tuple(field.name for field in fields(Row))


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow([f"{value:.4g}" if isinstance(value, float) else value for value in astuple(row)])


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows as text. Raises ValueError for a file with other columns."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(
                f"{path} has columns {reader.fieldnames}; expected {list(COLUMNS)}. Make it with `python -m "
                f"benchmarks.run`."
            )
        return list(reader)
