# SPDX-License-Identifier: Apache-2.0
"""The folder of one run, and the summary over runs. Every file is made from raw predictions and can be made again.

config.json          method, seed, order of tasks, the whole configuration, its fingerprint
environment.json     machine, versions, commit, threads, sha256 of the base weights
matrix.csv           stage 0 .. N, one column per task in the order learned; empty = not measured
predictions.jsonl.gz {"stage", "task", "id", "prediction", "route", "cut"}; route is null for unrouted methods; cut is
                     true where generation stopped at evaluation.max_new_tokens
references.jsonl.gz  {"task", "id", "metric", "answers", "options"}
losses.csv           stage, task, step, loss
result.json          aggregates, seconds, parameters, routing, well-formed shares, counts of cut answers, the cells that
                     `evaluation` left out, the row of each task's final score, the method's own report
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from dmole.data.sample import Stream
from dmole.files import JSON, write_atomically
from dmole.metrics.continual import aggregates
from dmole.runs.evaluation import Prediction

SUMMARY_COLUMNS = (
    "method",
    "seed",
    "order",
    "AVG",
    "Last",
    "BWT",
    "trainable_parameters",
    "train_seconds",
    "proxy_seconds",
    "router_seconds",
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


def summary_row(result: Mapping[str, JSON]) -> list[object]:
    """The run's row of summary.csv from its result.json; see `dmole.metrics.continual` for the three aggregates."""
    return [result["summary"][column] for column in SUMMARY_COLUMNS]


def aggregate_columns(matrix: np.ndarray, final_rows: Sequence[int]) -> dict[str, float | None]:
    """AVG, Last and BWT by D-MoLE's equations; None where a cell that they need was not measured."""
    values = aggregates(matrix, final_rows)
    return {"AVG": values.avg, "Last": values.last, "BWT": values.bwt}


def write_summary(output: Path) -> None:
    """`<output>/summary.csv` and `<output>/profile.csv` from every finished run below `<output>/runs`."""
    results = [json.loads(path.read_bytes()) for path in sorted((output / "runs").glob("*/result.json"))]
    write_csv(output / "summary.csv", SUMMARY_COLUMNS, (summary_row(result) for result in results))
    steps = {(r["summary"]["seed"], r["summary"]["order"], r["summary"]["method"]): r["profile"] for r in results}
    rows: list[list[object]] = []
    for (seed, order, method), profile in steps.items():
        if profile["step_ms"] is None:
            continue
        rival = steps.get((seed, order, "seq_ft"))
        parts = [profile["step_ms_by_part"].get(part, 0.0) for part in PROFILE_PARTS]
        ratio = None if rival is None or rival["step_ms"] is None else profile["step_ms"] / rival["step_ms"]
        rows.append([method, seed, order, *parts, profile["step_ms"], ratio, profile["evaluation_seconds"]])
    header = ("method", "seed", "order", *(f"{part}_ms" for part in PROFILE_PARTS), "step_ms", "times_seq_ft")
    write_csv(output / "profile.csv", (*header, "evaluation_seconds"), rows)
