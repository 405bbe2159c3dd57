# SPDX-License-Identifier: Apache-2.0
"""Every stored number again, from what it was made of.

    predictions.jsonl.gz + references.jsonl.gz  ->  each cell of matrix.csv, each share of well-formed answers, by the
                                                    version of the metric that the references name
    the routes in predictions.jsonl.gz          ->  the routing numbers of result.json
    matrix.csv                                  ->  AVG, Last, BWT of result.json
    result.json                                 ->  its row of summary.csv and of profile.csv, the steps of losses.csv,
                                                    the sha256 of every other file and of itself (`seals`)
    config.json                                 ->  its fingerprint, the name of the run's folder, the columns

A difference above 1e-6 (floats are stored with all their digits; another machine's logarithm may differ in the last
one), a cell without predictions, a prediction without a cell and a row without a run are all differences.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmole.config import fingerprint
from dmole.reports.continual import aggregates
from dmole.reports.differences import Difference, Verification, expect, expect_tree
from dmole.reports.routing_statistics import routing_statistics
from dmole.reports.seals import verify_seals
from dmole.reports.stored import (
    ResultsError,
    StoredPrediction,
    StoredReference,
    StoredRun,
    ratio_columns,
    read_csv,
    read_json,
    read_predictions,
    read_references,
    read_run,
    run_folders,
    scored_by,
)

# What reading a document of another form than expected can raise.
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, OSError)
KEY_COLUMNS = ("method", "seed", "order")
NOT_MEASURED = "not measured"
LOSS_COLUMNS = ("stage", "task", "step", "loss")


def verify_results(results: Path) -> Verification:
    """Recompute everything below a results folder. ResultsError only if there is nothing there to verify."""
    report = Verification()
    runs: list[StoredRun] = []
    for folder in run_folders(results):
        try:
            run = read_run(folder)
            runs.append(run)
            _verify_run(results, run, report)
        except MALFORMED as error:
            # A damaged file is a finding like any other: the remaining runs are still verified.
            said = str(error) if isinstance(error, ResultsError) else f"{type(error).__name__}: {error}"
            report.differences.append(
                Difference(file=_name(results, folder), cell="reading", stored=said, recomputed="nothing")
            )
        report.runs += 1
    _verify_summary(results, runs, report)
    _verify_profile(results, runs, report)
    return report


def _name(results: Path, path: Path) -> str:
    return path.relative_to(results).as_posix()


def _verify_run(results: Path, run: StoredRun, report: Verification) -> None:
    def name(file: str) -> str:
        return _name(results, run.folder / file)

    _verify_config(run, name("config.json"), report)
    verify_seals(run, name("result.json"), report)
    references = read_references(run.folder)
    cells: dict[tuple[int, str], list[StoredPrediction]] = {}
    for prediction in read_predictions(run.folder):
        cells.setdefault((prediction.stage, prediction.task), []).append(prediction)
    for stage, task in cells:
        if task not in run.tasks or task not in references or not 0 <= stage <= len(run.tasks):
            expect(report, name("predictions.jsonl.gz"), f"stage {stage}, task {task}", "predictions", "no such cell")
    shares: dict[str, dict[str, float]] = {}
    cut: dict[str, dict[str, int]] = {}
    for stage in range(len(run.tasks) + 1):
        for i, task in enumerate(run.tasks):
            stored = None if math.isnan(run.matrix[stage, i]) else float(run.matrix[stage, i])
            said = cells.get((stage, task))
            where = f"stage {stage}, task {task}"
            if said is None or task not in references:
                expect(report, name("matrix.csv"), where, stored, None, missing=NOT_MEASURED)
                continue
            texts = _paired(said, references[task], name("predictions.jsonl.gz"), where, report)
            if texts is None:
                continue
            try:
                metric = scored_by(references[task])
                points = metric.evaluate(texts, references[task])
            except ValueError as error:  # an unknown metric or version, or references that it refuses
                expect(report, name("references.jsonl.gz"), where, references[task][0].metric, str(error))
                continue
            expect(report, name("matrix.csv"), where, stored, points, missing=NOT_MEASURED)
            shares.setdefault(str(stage), {})[task] = metric.well_formed_share(texts, references[task])
            if all(prediction.cut is not None for prediction in said):
                cut.setdefault(str(stage), {})[task] = sum(bool(prediction.cut) for prediction in said)
            report.scores += 1
    expect_tree(report, name("result.json"), "well_formed", run.result.get("well_formed"), shares)
    expect_tree(
        report, name("result.json"), "cut_at_max_new_tokens", run.result.get("cut_at_max_new_tokens"), cut or None
    )
    _verify_routing(run, cells, name("result.json"), report)
    report.not_measured += len(run.not_measured)
    for stage, task in sorted(run.not_measured):
        # Left out by `evaluation`: there is nothing to show for it, in the matrix or in the predictions.
        if (stage, task) in cells:
            expect(report, name("result.json"), f"not_measured, stage {stage}, task {task}", "left out", "predictions")
    computed = aggregates(run.matrix, run.final_rows)
    for column, value in (("AVG", computed.avg), ("Last", computed.last), ("BWT", computed.bwt)):
        missing = NOT_MEASURED if run.not_measured else "nothing"
        expect(report, name("result.json"), f"summary.{column}", run.summary.get(column), value, missing=missing)
        report.aggregates += 1
    _verify_losses(run, name("losses.csv"), report)
    counts = run.result.get("trainable_parameters_by_stage")
    if isinstance(counts, list):
        mean = round(sum(counts) / len(counts)) if counts else 0
        stored_count = run.summary.get("trainable_parameters")
        expect(report, name("result.json"), "summary.trainable_parameters", stored_count, mean)


def _verify_losses(run: StoredRun, file: str, report: Verification) -> None:
    """Every step of every stage has one finite loss, in order, and there are as many as the run says."""
    header, rows = read_csv(run.folder / "losses.csv")
    if tuple(header) != LOSS_COLUMNS:
        expect(report, file, "header", ",".join(header), ",".join(LOSS_COLUMNS))
        return
    last: dict[str, int] = {}
    for stage, _, step, loss in rows:
        last[stage] = last.get(stage, 0) + 1
        expect(report, file, f"stage {stage}, step", _parsed(step), last[stage])
        value = _parsed(loss)
        if not isinstance(value, int | float) or not math.isfinite(value):
            expect(report, file, f"stage {stage}, step {step}, loss", loss, "a finite number")
    profile = run.result.get("profile") or {}
    expect(report, file, "steps", len(rows), profile.get("steps"))
    if profile.get("step_ms_by_part"):
        parts = sum(profile["step_ms_by_part"].values())
        expect(report, file.replace("losses.csv", "result.json"), "profile.step_ms", profile.get("step_ms"), parts)


def _verify_config(run: StoredRun, file: str, report: Verification) -> None:
    config = read_json(run.folder / "config.json")
    if not isinstance(config, dict):
        expect(report, file, "document", type(config).__name__, "an object")
        return
    for key in KEY_COLUMNS:
        expect(report, file, key, config.get(key), run.summary[key])
    expect(report, file, "tasks", config.get("tasks"), list(run.tasks))
    expect(report, file, "fingerprint", config.get("fingerprint"), fingerprint(config.get("identity")))
    expect(report, file, "folder", run.folder.name, f"{run.method}-seed{run.seed}-{run.order}")


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
        expect(report, file, where, f"{len(said)} predictions", f"{len(by_id)} ids")
        return None
    if set(by_id) != wanted:
        first = sorted(set(by_id) ^ wanted)[0]
        expect(report, file, where, f"{len(by_id)} predictions", f"{len(wanted)} references (differ in {first!r})")
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
    expect_tree(report, file, "routing", run.result.get("routing"), expected)
    whole = all((len(run.tasks), task) in cells for task in run.tasks)
    last = expected.get(str(len(run.tasks)), {}) if whole else {}
    for column in ("routing_accuracy", "base_model_share"):
        expect(report, file, f"summary.{column}", run.summary.get(column), last.get(column))
        report.aggregates += 1


def _verify_summary(results: Path, runs: Sequence[StoredRun], report: Verification) -> None:
    rows = _keyed_rows(results / "summary.csv", report)
    by_key = {tuple(str(run.summary[key]) for key in KEY_COLUMNS): run for run in runs}
    for key in dict.fromkeys([*rows, *by_key]):
        run, cells = by_key.get(key), rows.get(key)
        where = f"row {' '.join(key)}"
        if run is None or cells is None:
            stored = "no row" if cells is None else "a row"
            expect(report, "summary.csv", where, stored, "no finished run" if run is None else "a row")
            continue
        for column in dict.fromkeys([*run.summary, *cells]):
            stored_cell = _parsed(cells.get(column))
            expect(report, "summary.csv", f"{where}, {column}", stored_cell, run.summary.get(column))
            report.aggregates += 1


def _verify_profile(results: Path, runs: Sequence[StoredRun], report: Verification) -> None:
    """Every time in profile.csv is that of result.json, and the ratios to the baselines' are right."""
    path = results / "profile.csv"
    if not path.exists() and not any("files" in run.result for run in runs):
        return  # written by hand, or by a version that had none
    rows = _keyed_rows(path, report)
    profiles = {tuple(str(run.summary[key]) for key in KEY_COLUMNS): run.result.get("profile") or {} for run in runs}
    for key in (key for key, own in profiles.items() if own.get("step_ms") is not None and key not in rows):
        expect(report, "profile.csv", f"row {' '.join(key)}", "no row", "a row")
    for key, cells in rows.items():
        profile = profiles.get(key, {})
        own, parts = profile.get("step_ms"), profile.get("step_ms_by_part") or {}
        expected: dict[str, Any] = {"step_ms": own}
        for column in cells:
            if column == "evaluation_seconds":
                expected[column] = profile.get(column)
            elif column in (ratios := ratio_columns(cells)):
                theirs = profiles.get((ratios[column], *key[1:]), {}).get("step_ms")
                expected[column] = None if own is None or not theirs else own / theirs
            elif column.endswith("_ms") and column != "step_ms":
                expected[column] = parts.get(column.removesuffix("_ms"))
        for column, value in expected.items():
            expect(report, "profile.csv", f"row {' '.join(key)}, {column}", _parsed(cells.get(column)), value)


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
        expect(report, path.name, "header", ",".join(header), f"the columns {', '.join(KEY_COLUMNS)}")
        return {}
    keyed: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        key = tuple(cells[column] for column in KEY_COLUMNS)
        if key in keyed:
            expect(report, path.name, f"row {' '.join(key)}", "two rows", "one row")
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
