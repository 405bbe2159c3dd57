# SPDX-License-Identifier: Apache-2.0
"""Every stored number again, from what it was made of.

    predictions.jsonl.gz + references.jsonl.gz  ->  each cell of matrix.csv, each share of well-formed answers
    the routes in predictions.jsonl.gz          ->  the routing numbers of result.json
    matrix.csv                                  ->  AVG, Last, BWT of result.json
    result.json                                 ->  its row of summary.csv and of profile.csv, the steps of losses.csv
    config.json                                 ->  its fingerprint, the name of the run's folder, the columns

A difference above 1e-6 (floats are stored with all their digits; another machine's logarithm may differ in the last
one), a cell without predictions, a prediction without a cell and a row without a run are all differences.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmole.config import fingerprint
from dmole.metrics import METRICS
from dmole.metrics.continual import aggregates
from dmole.reports.routing_statistics import routing_statistics
from dmole.reports.stored import (
    ResultsError,
    StoredPrediction,
    StoredReference,
    StoredRun,
    read_csv,
    read_json,
    read_predictions,
    read_references,
    read_run,
    run_folders,
)

TOLERANCE = 1e-6
KEY_COLUMNS = ("method", "seed", "order")
NOT_MEASURED = "not measured"
LOSS_COLUMNS = ("stage", "task", "step", "loss")


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
    differences: list[Difference] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        checked = f"{self.runs} runs, {self.scores} scores from raw predictions, {self.aggregates} aggregates"
        if self.not_measured:
            checked += f", {self.not_measured} cells not measured"
        if self.ok:
            return f"verified {checked}: all as stored"
        count = len(self.differences)
        return "\n".join([*map(str, self.differences), f"checked {checked}: {count} difference{'s' * (count != 1)}"])


def verify_results(results: Path) -> Verification:
    """Recompute everything below a results folder. ResultsError only if there is nothing there to verify."""
    report = Verification()
    runs: list[StoredRun] = []
    for folder in run_folders(results):
        try:
            run = read_run(folder)
            runs.append(run)
            _verify_run(results, run, report)
        except ResultsError as error:
            # A damaged file is a finding like any other: the remaining runs are still verified.
            report.differences.append(
                Difference(file=_name(results, folder), cell="reading", stored=str(error), recomputed="nothing")
            )
        report.runs += 1
    _verify_summary(results, runs, report)
    _verify_profile(results, runs, report)
    return report


def _name(results: Path, path: Path) -> str:
    return path.relative_to(results).as_posix()


def _same(stored: Any, expected: Any) -> bool:
    if isinstance(stored, bool) or isinstance(expected, bool):
        return stored is expected
    if isinstance(stored, int | float) and isinstance(expected, int | float):
        return math.isclose(stored, expected, rel_tol=0.0, abs_tol=TOLERANCE)
    return bool(stored == expected)


def _expect(
    report: Verification, file: str, cell: str, stored: Any, expected: Any, *, missing: str = "nothing"
) -> None:
    if not _same(stored, expected):
        shown = [missing if value is None else str(value) for value in (stored, expected)]
        report.differences.append(Difference(file=file, cell=cell, stored=shown[0], recomputed=shown[1]))


def _verify_run(results: Path, run: StoredRun, report: Verification) -> None:
    def name(file: str) -> str:
        return _name(results, run.folder / file)

    _verify_config(run, name("config.json"), report)
    read_json(run.folder / "environment.json")
    references = read_references(run.folder)
    cells: dict[tuple[int, str], list[StoredPrediction]] = {}
    for prediction in read_predictions(run.folder):
        cells.setdefault((prediction.stage, prediction.task), []).append(prediction)
    for stage, task in cells:
        if task not in run.tasks or task not in references or not 0 <= stage <= len(run.tasks):
            _expect(report, name("predictions.jsonl.gz"), f"stage {stage}, task {task}", "predictions", "no such cell")
    shares: dict[str, dict[str, float]] = {}
    cut: dict[str, dict[str, int]] = {}
    for stage in range(len(run.tasks) + 1):
        for i, task in enumerate(run.tasks):
            stored = None if math.isnan(run.matrix[stage, i]) else float(run.matrix[stage, i])
            said = cells.get((stage, task))
            where = f"stage {stage}, task {task}"
            if said is None or task not in references:
                _expect(report, name("matrix.csv"), where, stored, None, missing=NOT_MEASURED)
                continue
            texts = _paired(said, references[task], name("predictions.jsonl.gz"), where, report)
            if texts is None:
                continue
            metric = METRICS.get(references[task][0].metric)
            if metric is None:
                _expect(report, name("references.jsonl.gz"), where, references[task][0].metric, "a known metric")
                continue
            points = metric.evaluate(texts, references[task])
            _expect(report, name("matrix.csv"), where, stored, points, missing=NOT_MEASURED)
            shares.setdefault(str(stage), {})[task] = metric.well_formed_share(texts, references[task])
            if all(prediction.cut is not None for prediction in said):
                cut.setdefault(str(stage), {})[task] = sum(bool(prediction.cut) for prediction in said)
            report.scores += 1
    _verify_tree(report, name("result.json"), "well_formed", run.result.get("well_formed"), shares)
    _verify_tree(
        report, name("result.json"), "cut_at_max_new_tokens", run.result.get("cut_at_max_new_tokens"), cut or None
    )
    _verify_routing(run, cells, name("result.json"), report)
    report.not_measured += len(run.not_measured)
    for stage, task in sorted(run.not_measured):
        # Left out by `evaluation`: there is nothing to show for it, in the matrix or in the predictions.
        if (stage, task) in cells:
            _expect(report, name("result.json"), f"not_measured, stage {stage}, task {task}", "left out", "predictions")
    computed = aggregates(run.matrix, run.final_rows)
    for column, value in (("AVG", computed.avg), ("Last", computed.last), ("BWT", computed.bwt)):
        missing = NOT_MEASURED if run.not_measured else "nothing"
        _expect(report, name("result.json"), f"summary.{column}", run.summary.get(column), value, missing=missing)
        report.aggregates += 1
    _verify_losses(run, name("losses.csv"), report)
    counts = run.result.get("trainable_parameters_by_stage")
    if isinstance(counts, list):
        mean = round(sum(counts) / len(counts)) if counts else 0
        stored_count = run.summary.get("trainable_parameters")
        _expect(report, name("result.json"), "summary.trainable_parameters", stored_count, mean)


def _verify_losses(run: StoredRun, file: str, report: Verification) -> None:
    """Every step of every stage has one finite loss, in order, and there are as many as the run says."""
    header, rows = read_csv(run.folder / "losses.csv")
    if tuple(header) != LOSS_COLUMNS:
        _expect(report, file, "header", ",".join(header), ",".join(LOSS_COLUMNS))
        return
    last: dict[str, int] = {}
    for stage, _, step, loss in rows:
        last[stage] = last.get(stage, 0) + 1
        _expect(report, file, f"stage {stage}, step", _parsed(step), last[stage])
        value = _parsed(loss)
        if not isinstance(value, int | float) or not math.isfinite(value):
            _expect(report, file, f"stage {stage}, step {step}, loss", loss, "a finite number")
    steps = (run.result.get("profile") or {}).get("steps")
    _expect(report, file, "steps", len(rows), steps)


def _verify_config(run: StoredRun, file: str, report: Verification) -> None:
    config = read_json(run.folder / "config.json")
    if not isinstance(config, dict):
        _expect(report, file, "document", type(config).__name__, "an object")
        return
    for key in KEY_COLUMNS:
        _expect(report, file, key, config.get(key), run.summary[key])
    _expect(report, file, "tasks", config.get("tasks"), list(run.tasks))
    _expect(report, file, "fingerprint", config.get("fingerprint"), fingerprint(config.get("identity")))
    _expect(report, file, "folder", run.folder.name, f"{run.method}-seed{run.seed}-{run.order}")


def _paired(
    said: Sequence[StoredPrediction],
    references: Sequence[StoredReference],
    file: str,
    where: str,
    report: Verification,
) -> list[str] | None:
    """The predictions in the order of the references, or None after having reported that they do not pair."""
    by_id = {prediction.id: prediction.prediction for prediction in said}
    wanted = {reference.id for reference in references}
    if len(by_id) != len(said):
        _expect(report, file, where, f"{len(said)} predictions", f"{len(by_id)} ids")
        return None
    if set(by_id) != wanted:
        first = sorted(set(by_id) ^ wanted)[0]
        _expect(report, file, where, f"{len(by_id)} predictions", f"{len(wanted)} references (differ in {first!r})")
        return None
    return [by_id[reference.id] for reference in references]


def _verify_routing(
    run: StoredRun, cells: Mapping[tuple[int, str], Sequence[StoredPrediction]], file: str, report: Verification
) -> None:
    expected: dict[str, dict[str, float]] = {}
    for stage in range(1, len(run.tasks) + 1):
        statistics = routing_statistics(
            [prediction for (row, _), said in cells.items() if row == stage for prediction in said], run.tasks[:stage]
        )
        if statistics:
            expected[str(stage)] = statistics
    _verify_tree(report, file, "routing", run.result.get("routing"), expected)
    whole = all((len(run.tasks), task) in cells for task in run.tasks)
    last = expected.get(str(len(run.tasks)), {}) if whole else {}
    for column in ("routing_accuracy", "base_model_share"):
        _expect(report, file, f"summary.{column}", run.summary.get(column), last.get(column))
        report.aggregates += 1


def _verify_tree(report: Verification, file: str, name: str, stored: Any, expected: Any) -> None:
    """Compare two nested mappings leaf by leaf."""
    if isinstance(expected, Mapping) and isinstance(stored, Mapping):
        for key in dict.fromkeys([*expected, *stored]):
            _verify_tree(report, file, f"{name}.{key}", stored.get(key), expected.get(key))
        return
    _expect(report, file, name, stored, expected)


def _verify_summary(results: Path, runs: Sequence[StoredRun], report: Verification) -> None:
    rows = _keyed_rows(results / "summary.csv", report)
    by_key = {tuple(str(run.summary[key]) for key in KEY_COLUMNS): run for run in runs}
    for key in dict.fromkeys([*rows, *by_key]):
        run, cells = by_key.get(key), rows.get(key)
        where = f"row {' '.join(key)}"
        if run is None or cells is None:
            stored = "no row" if cells is None else "a row"
            _expect(report, "summary.csv", where, stored, "no finished run" if run is None else "a row")
            continue
        for column in dict.fromkeys([*run.summary, *cells]):
            stored_cell = _parsed(cells.get(column))
            _expect(report, "summary.csv", f"{where}, {column}", stored_cell, run.summary.get(column))
            report.aggregates += 1


def _verify_profile(results: Path, runs: Sequence[StoredRun], report: Verification) -> None:
    """The step times of profile.csv are those of result.json, and their ratio to Seq-FT's is right."""
    path = results / "profile.csv"
    if not path.exists():
        return
    rows = _keyed_rows(path, report)
    times = {
        tuple(str(run.summary[key]) for key in KEY_COLUMNS): (run.result.get("profile") or {}).get("step_ms")
        for run in runs
    }
    for key in (key for key, own in times.items() if own is not None and key not in rows):
        _expect(report, "profile.csv", f"row {' '.join(key)}", "no row", "a row")
    for key, cells in rows.items():
        where, own = f"row {' '.join(key)}", times.get(key)
        rival = times.get(("seq_ft", *key[1:]))
        _expect(report, "profile.csv", f"{where}, step_ms", _parsed(cells.get("step_ms")), own)
        ratio = None if own is None or not rival else own / rival
        _expect(report, "profile.csv", f"{where}, times_seq_ft", _parsed(cells.get("times_seq_ft")), ratio)


def _keyed_rows(path: Path, report: Verification) -> dict[tuple[str, ...], dict[str, str]]:
    """Rows by (method, seed, order); what cannot be read is reported and gives no rows."""
    try:
        header, rows = read_csv(path)
    except ResultsError as error:
        report.differences.append(
            Difference(file=path.name, cell="reading", stored=str(error), recomputed="one row per run")
        )
        return {}
    if not set(KEY_COLUMNS) <= set(header):
        _expect(report, path.name, "header", ",".join(header), f"the columns {', '.join(KEY_COLUMNS)}")
        return {}
    keyed: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        key = tuple(cells[column] for column in KEY_COLUMNS)
        if key in keyed:
            _expect(report, path.name, f"row {' '.join(key)}", "two rows", "one row")
        keyed[key] = cells
    return keyed


def _parsed(cell: str | None) -> Any:
    """A CSV cell as None, a number or text."""
    if cell is None or cell == "":
        return None
    try:
        return int(cell)
    except ValueError:
        pass
    try:
        return float(cell)
    except ValueError:
        return cell
