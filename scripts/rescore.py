# SPDX-License-Identifier: Apache-2.0
"""Scores the raw predictions of committed runs with the metrics of today, beside what their own versions gave.

    python scripts/rescore.py results/mini results/mini_matched_neighbour > results/rescored.csv

One line per folder, method and number, the mean over seeds: AVG, Last and BWT, and of every task whose metric has a
newer version its score in the final row, with how many cells of the matrices differ. Results stay as they are:
`dmole verify` scores them with the version that they name.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dmole.metrics import METRICS
from dmole.reports.continual import aggregates
from dmole.reports.stored import StoredRun, read_predictions, read_references, read_runs
from dmole.reports.tables import final_points, groups

COLUMNS = ("results", "method", "number", "metric", "stored", "rescored", "cells", "changed")


def rescored(run: StoredRun) -> dict[str, tuple[str, float, float, int, int]]:
    """{number: (metric and versions, stored, rescored, cells, changed cells)} of one run."""
    references, matrix = read_references(run.folder), run.matrix.copy()
    said: dict[tuple[int, str], dict[str, str]] = {}
    for prediction in read_predictions(run.folder):
        said.setdefault((prediction.stage, prediction.task), {})[prediction.id] = prediction.prediction
    found: dict[str, tuple[str, float, float, int, int]] = {}
    for i, task in enumerate(run.tasks):
        first, metric = references[task][0], METRICS[references[task][0].metric]
        if first.metric_version == metric.version:
            continue
        for stage in np.flatnonzero(~np.isnan(matrix[:, i])):
            texts = [said[int(stage), task][reference.id] for reference in references[task]]
            matrix[stage, i] = metric.evaluate(texts, references[task])
        differ = int((np.abs(matrix[:, i] - run.matrix[:, i]) > 1e-9).sum())
        found[task] = (
            f"{metric.name} {first.metric_version} -> {metric.version}",
            final_points(run)[task],
            final_points(StoredRun(folder=run.folder, tasks=run.tasks, matrix=matrix, result=run.result))[task],
            int((~np.isnan(matrix[:, i])).sum()),
            differ,
        )
    counts = sum(one[3] for one in found.values()), sum(one[4] for one in found.values())
    old, new = (aggregates(values, run.final_rows) for values in (run.matrix, matrix))
    for name, before, after in (("AVG", old.avg, new.avg), ("Last", old.last, new.last), ("BWT", old.bwt, new.bwt)):
        if before is not None and after is not None:
            found[name] = ("", before, after, *counts)
    return found


def lines(folder: Path) -> Iterator[tuple[str, ...]]:
    """The table's lines of one results folder."""
    for (method, order), runs in groups(read_runs(folder)).items():
        by_run = [rescored(run) for run in runs]
        for number in by_run[0]:
            metrics, *columns = zip(*(found[number] for found in by_run), strict=True)
            stored, new = (math.fsum(values) / len(values) for values in columns[:2])
            cells, changed = (sum(values) for values in columns[2:])
            label = method if order == "default" else f"{method} ({order})"
            yield folder.name, label, number, metrics[0], f"{stored:.2f}", f"{new:.2f}", str(cells), str(changed)


def main(folders: list[str]) -> None:
    """Prints the table."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(COLUMNS)
    for folder in folders:
        writer.writerows(lines(Path(folder)))


if __name__ == "__main__":
    main(sys.argv[1:])
