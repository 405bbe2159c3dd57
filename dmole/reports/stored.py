# SPDX-License-Identifier: Apache-2.0
"""Results as they lie on disk, read strictly: a file that is missing or malformed is an error that names it.

A results folder holds `summary.csv` and `runs/<method>-seed<k>-<order>/`; the files of a run are listed in
`dmole/reports/run_files.py`. Reading is kept apart from writing, so that `verify` finds what writing did wrong; the
metrics are the same code.
"""

import csv
import gzip
import json
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmole.files import JSON
from dmole.metrics import METRICS, Metric
from dmole.reports.continual import Array

FINISHED = "result.json"


class ResultsError(ValueError):
    """A results folder cannot be read; the text names the file and what it should hold."""


@dataclass(frozen=True, kw_only=True)
class StoredPrediction:
    """A line of predictions.jsonl.gz. `route` is None for an unrouted method and () for the base model."""

    stage: int
    task: str
    id: str
    prediction: str
    route: tuple[str, ...] | None
    cut: bool | None = None
    """Whether generation stopped at evaluation.max_new_tokens; None in results that did not record it."""


@dataclass(frozen=True, kw_only=True)
class StoredReference:
    """A line of references.jsonl.gz: what one test sample is scored against (a `dmole.metrics.Scorable`)."""

    task: str
    id: str
    metric: str
    answers: tuple[str, ...]
    options: tuple[str, ...]
    metric_version: int = 1
    """`Metric.version` of the run; results from before versions were stored are of version 1."""


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """One finished run."""

    folder: Path
    tasks: tuple[str, ...]
    matrix: Array
    result: dict[str, JSON]

    @property
    def summary(self) -> dict[str, JSON]:
        """The run's own copy of its row of summary.csv."""
        return dict(self.result["summary"])

    @property
    def final_rows(self) -> tuple[int, ...] | None:
        """The row of each task's final score in the method's protocol; None in results that did not record it."""
        stored = self.result.get("final_rows")
        return None if stored is None else tuple(int(stored[task]) for task in self.tasks)

    @property
    def not_measured(self) -> frozenset[tuple[int, str]]:
        """The cells (row, task) that the method's protocol has and the settings of the evaluation left out."""
        return frozenset((int(row), str(task)) for row, task in self.result.get("not_measured", ()))

    @property
    def method(self) -> str:
        return str(self.summary["method"])

    @property
    def seed(self) -> int:
        return int(self.summary["seed"])

    @property
    def order(self) -> str:
        return str(self.summary["order"])


def run_folders(results: Path) -> list[Path]:
    """The folders of finished runs below `results`, by name. ResultsError if there is none."""
    found = sorted(path.parent for path in (results / "runs").glob(f"*/{FINISHED}"))
    if not found:
        raise ResultsError(
            f"{results} has no finished run (no runs/*/{FINISHED}); expected a folder that `dmole run` has written. "
            "Give its --output folder."
        )
    return found


def read_runs(results: Path) -> list[StoredRun]:
    """Every finished run of a results folder."""
    return [read_run(folder) for folder in run_folders(results)]


def read_run(folder: Path) -> StoredRun:
    """One finished run."""
    result = read_json(folder / FINISHED)
    if not isinstance(result, dict) or not isinstance(result.get("summary"), dict):
        raise ResultsError(f"{folder / FINISHED}: expected an object with the key 'summary'. Run it again.")
    missing = [key for key in ("method", "seed", "order") if key not in result["summary"]]
    if missing:
        raise ResultsError(f"{folder / FINISHED}: summary has no {', '.join(missing)}. Run it again.")
    profile = result.get("profile") or {}
    mappings = {"profile": profile, **{key: result.get(key) or {} for key in ("routing", "well_formed", "files")}}
    if isinstance(profile, dict):
        mappings["profile.step_ms_by_part"] = profile.get("step_ms_by_part") or {}
    wrong = [key for key, value in mappings.items() if not isinstance(value, dict)]
    if not wrong and not isinstance(profile.get("step_ms"), int | float | None):
        wrong = ["profile.step_ms"]
    if wrong:
        raise ResultsError(f"{folder / FINISHED}: {wrong[0]} has the wrong type. Run it again.")
    tasks, matrix = read_matrix(folder / "matrix.csv")
    final = result.get("final_rows", dict.fromkeys(tasks, 0))
    if set(final) != set(tasks) or not all(isinstance(row, int) and 0 <= row <= len(tasks) for row in final.values()):
        raise ResultsError(
            f"{folder / FINISHED}: final_rows is {final}; expected a row from 0 to {len(tasks)} for each task. "
            "Run it again."
        )
    return StoredRun(folder=folder, tasks=tasks, matrix=matrix, result=result)


def read_json(path: Path) -> JSON:
    """The JSON document at `path`."""
    try:
        return json.loads(_bytes(path))
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{path}: is not JSON ({error}). Run it again.") from error


def read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a CSV file as text; every row must be as long as the header."""
    try:
        rows = list(csv.reader(_bytes(path).decode().splitlines()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ResultsError(f"{path}: is not a CSV file in UTF-8 ({error}). Run it again.") from error
    if not rows:
        raise ResultsError(f"{path}: is empty; expected a header. Run it again.")
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(rows[0]):
            raise ResultsError(f"{path}:{number}: has {len(row)} cells; expected {len(rows[0])}. Run it again.")
    return rows[0], rows[1:]


def ratio_columns(header: Iterable[str]) -> dict[str, str]:
    """{column: method} of the columns of profile.csv that divide by the step time of a method's run."""
    return {name: name.removeprefix("times_") for name in header if name.startswith("times_")}


def read_matrix(path: Path) -> tuple[tuple[str, ...], Array]:
    """Task names and A[t][i] as [N + 1, N]; an empty cell or an absent row is NaN (not measured)."""
    header, rows = read_csv(path)
    tasks = tuple(header[1:])
    if header[0] != "stage" or not tasks or len(set(tasks)) != len(tasks):
        raise ResultsError(f"{path}:1: header is {','.join(header)}; expected stage and one column per task.")
    matrix = np.full((len(tasks) + 1, len(tasks)), np.nan)
    seen: set[int] = set()
    for number, row in enumerate(rows, start=2):
        if not row[0].isdecimal() or not 0 <= int(row[0]) <= len(tasks) or int(row[0]) in seen:
            raise ResultsError(f"{path}:{number}: stage is {row[0]!r}; expected 0..{len(tasks)}, each at most once.")
        seen.add(int(row[0]))
        for i, cell in enumerate(row[1:]):
            matrix[int(row[0]), i] = math.nan if cell == "" else parse_number(cell, path, number)
    return tasks, matrix


def parse_number(cell: str, path: Path, line: int) -> float:
    """A finite number in a CSV cell."""
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ResultsError(f"{path}:{line}: cell is {cell!r}; expected a number or nothing.")
    return value


def read_predictions(folder: Path) -> list[StoredPrediction]:
    """All raw predictions of a run."""
    predictions = []
    for where, line in _lines(folder / "predictions.jsonl.gz", ("stage", "task", "id", "prediction", "route")):
        route = line["route"]
        well_typed = (
            isinstance(line["stage"], int)
            and all(isinstance(line[key], str) for key in ("task", "id", "prediction"))
            and (route is None or _is_texts(route))
            and isinstance(line.get("cut"), bool | None)
        )
        if not well_typed:
            raise ResultsError(f"{where}: a value has the wrong type. Run it again.")
        predictions.append(
            StoredPrediction(
                stage=line["stage"],
                task=line["task"],
                id=line["id"],
                prediction=line["prediction"],
                route=None if route is None else tuple(route),
                cut=line.get("cut"),
            )
        )
    return predictions


def read_references(folder: Path) -> dict[str, list[StoredReference]]:
    """The test samples of each task, in the order of the test set."""
    by_task: dict[str, list[StoredReference]] = {}
    for where, line in _lines(folder / "references.jsonl.gz", ("task", "id", "metric", "answers", "options")):
        well_typed = (
            all(isinstance(line[key], str) for key in ("task", "id", "metric"))
            and _is_texts(line["answers"])
            and line["answers"]
            and _is_texts(line["options"])
            and type(line.get("metric_version", 1)) is int
        )
        if not well_typed:
            raise ResultsError(f"{where}: a value has the wrong type. Run it again.")
        reference = StoredReference(
            task=line["task"],
            id=line["id"],
            metric=line["metric"],
            answers=tuple(line["answers"]),
            options=tuple(line["options"]),
            metric_version=line.get("metric_version", 1),
        )
        by_task.setdefault(reference.task, []).append(reference)
    for task, references in by_task.items():
        metrics = {(reference.metric, reference.metric_version) for reference in references}
        if len({reference.id for reference in references}) != len(references) or len(metrics) != 1:
            raise ResultsError(
                f"{folder / 'references.jsonl.gz'}: task {task!r} has an id twice or several metrics. Run it again."
            )
    return by_task


def scored_by(references: Sequence[StoredReference]) -> Metric:
    """The metric that scored a task, in the version of the run. ResultsError for one that is not installed."""
    name, version = references[0].metric, references[0].metric_version
    if name not in METRICS:
        known = ", ".join(METRICS)
        raise ResultsError(f"metric: got {name!r}; expected one of {known}. Install the package that registers it.")
    try:
        return METRICS[name].at(version)
    except ValueError as error:
        raise ResultsError(str(error)) from error


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _lines(path: Path, keys: tuple[str, ...]) -> list[tuple[str, dict[str, JSON]]]:
    """The objects of a .jsonl.gz file with where each stood."""
    try:
        # Not splitlines: a prediction may hold U+2028 and its like, which are no line ends in JSON lines.
        lines = gzip.decompress(_bytes(path)).decode().split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ResultsError(f"{path}: is damaged ({error}); expected gzip of UTF-8 lines. Run it again.") from error
    found = []
    for number, text in enumerate(lines, start=1):
        if not text:
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ResultsError(f"{path}:{number}: is not JSON ({error}). Run it again.") from error
        if not isinstance(line, dict) or not set(keys) <= set(line):
            raise ResultsError(f"{path}:{number}: expected an object with {', '.join(keys)}. Run it again.")
        found.append((f"{path}:{number}", line))
    return found


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror}). Run it again.") from error
