# SPDX-License-Identifier: Apache-2.0
"""The folder of one run, and the summary over runs. Every file is made from raw predictions and can be made again.

config.json          method, seed, order of tasks, the whole configuration, its fingerprint
environment.json     machine, versions, commit, threads, sha256 of the base weights; the same of every later start
matrix.csv           stage 0 .. N, one column per task in the order learned; empty = not measured
predictions.jsonl.gz {"stage", "task", "id", "prediction", "route", "cut"}; route is null for unrouted methods; cut is
                     true where generation stopped at evaluation.max_new_tokens
references.jsonl.gz  {"task", "id", "metric", "metric_version", "answers", "options"}
losses.csv           stage, task, step, loss
model/               what the run has learned, see `dmole.grown.saved`
result.json          aggregates, seconds, parameters, routing, well-formed shares, counts of cut answers, the cells that
                     `evaluation` left out, the row of each task's final score, the method's own report; the digests of
                     every file, see `dmole.reports.seals`
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dmole.data.sample import Stream
from dmole.files import JSON, write_atomically
from dmole.metrics import METRICS
from dmole.reports.continual import aggregates

if TYPE_CHECKING:
    from dmole.runs.evaluation import Prediction

# Columns of every method; what a method's `timings` and `columns` name comes after them.
SUMMARY_COLUMNS = (
    "method",
    "seed",
    "order",
    "AVG",
    "Last",
    "BWT",
    "trainable_parameters",
    "train_seconds",
    "routing_accuracy",
    "base_model_share",
)
PROFILE_PARTS = ("data", "forward", "backward", "optimizer")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A CSV file, atomically; None and NaN are empty cells, floats keep all their digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_cell(value) for value in row] for row in rows)
    write_atomically(path, text.getvalue().encode())


def write_lines(path: Path, rows: Iterable[Mapping[str, JSON]]) -> None:
    """One JSON object per line, gzip with no time stamp: equal rows give equal bytes."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, gzip.compress(text.encode(), compresslevel=6, mtime=0))


def _cell(value: object) -> object:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return repr(value) if isinstance(value, float) else value


def matrix_of(points: Mapping[int, Mapping[str, float]], tasks: Sequence[str]) -> np.ndarray:
    """A[t][i] as float64 [N + 1, N], NaN where `points[row][task]` was not measured."""
    matrix = np.full((len(tasks) + 1, len(tasks)), np.nan)
    for row, by_task in points.items():
        for task, value in by_task.items():
            matrix[row, tasks.index(task)] = value
    return matrix


def write_matrix(path: Path, matrix: np.ndarray, tasks: Sequence[str]) -> None:
    """matrix.csv: the stage in front, then one column per task."""
    write_csv(path, ("stage", *tasks), ([stage, *map(float, row)] for stage, row in enumerate(matrix)))


def write_references(path: Path, stream: Stream) -> None:
    """What the predictions are scored against."""
    write_lines(
        path,
        (
            {
                "task": task.name,
                "id": sample.id,
                "metric": task.metric,
                "metric_version": METRICS[task.metric].version,
                "answers": list(sample.answers),
                "options": list(sample.options),
            }
            for task in stream.tasks
            for sample in task.test
        ),
    )


def prediction_line(stage: int, prediction: Prediction) -> dict[str, JSON]:
    """One line of predictions.jsonl.gz."""
    route = None if prediction.route is None else list(prediction.route)
    return {
        "stage": stage,
        "task": prediction.task,
        "id": prediction.id,
        "prediction": prediction.text,
        "route": route,
        "cut": prediction.cut,
    }


def method_columns(timings: Mapping[str, float], columns: Mapping[str, JSON], method: str) -> dict[str, JSON]:
    """A method's own columns of summary.csv; ValueError for one that is taken or cannot stand in a cell."""
    for name, value in columns.items():
        if name in SUMMARY_COLUMNS or name in timings:
            raise ValueError(f"columns: got {name!r} from {method}, which is another column; expected a new name.")
        if not isinstance(value, int | float | str | None):
            raise ValueError(f"columns: got {value!r} for {name!r} from {method}; expected a number, text or None.")
    return {**{name: round(seconds, 3) for name, seconds in timings.items()}, **columns}


def aggregate_columns(matrix: np.ndarray, final_rows: Sequence[int]) -> dict[str, float | None]:
    """AVG, Last and BWT by D-MoLE's equations; None where a cell that they need was not measured."""
    values = aggregates(matrix, final_rows)
    return {"AVG": values.avg, "Last": values.last, "BWT": values.bwt}


def write_summary(output: Path) -> list[str]:
    """`<output>/summary.csv` and `<output>/profile.csv` from every finished run below `<output>/runs`.

    A column times_<method> is the step time over that of the method's run with the same seed and order, for every
    method that is a `time_baseline`. Returns a sentence for each run whose result.json cannot be read; it has no row.
    """
    results, damaged = [], []
    for path in sorted((output / "runs").glob("*/result.json")):
        try:
            result = json.loads(path.read_bytes())
            _summary_rows([result])
        except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
            damaged.append(
                f"{path} cannot be read ({type(error).__name__}): its run is not in summary.csv. Restore it, or run "
                "it again with --fresh."
            )
        else:
            results.append(result)
    for name, (header, rows) in zip(("summary.csv", "profile.csv"), _summary_rows(results), strict=True):
        write_csv(output / name, header, rows)
    return damaged


Table = tuple[Sequence[str], list[list[object]]]


def _summary_rows(results: Sequence[Mapping[str, JSON]]) -> tuple[Table, Table]:
    """Header and rows of summary.csv and of profile.csv."""
    columns = list(dict.fromkeys([*SUMMARY_COLUMNS, *(name for result in results for name in result["summary"])]))
    summary = [[result["summary"].get(name) for name in columns] for result in results]
    steps = {(r["summary"]["seed"], r["summary"]["order"], r["summary"]["method"]): r["profile"] for r in results}
    baselines = sorted({method for (_, _, method), profile in steps.items() if profile.get("time_baseline")})
    rows: list[list[object]] = []
    for (seed, order, method), profile in steps.items():
        own = profile["step_ms"]
        if own is None:
            continue
        if not isinstance(own, int | float):
            raise TypeError(f"step_ms: got {own!r}; expected a number.")
        times = [(steps.get((seed, order, baseline)) or {}).get("step_ms") for baseline in baselines]
        parts = [profile["step_ms_by_part"].get(part, 0.0) for part in PROFILE_PARTS]
        ratios = [own / time if time else None for time in times]
        rows.append([method, seed, order, *parts, own, *ratios, profile["evaluation_seconds"]])
    header = ("method", "seed", "order", *(f"{part}_ms" for part in PROFILE_PARTS), "step_ms")
    return (columns, summary), ((*header, *(f"times_{name}" for name in baselines), "evaluation_seconds"), rows)
