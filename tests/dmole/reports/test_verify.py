# SPDX-License-Identifier: Apache-2.0
"""Verification accepts a sound results folder and catches every edited number, file by file."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmole.reports.stored import ResultsError, read_predictions, read_runs
from dmole.reports.verify import verify_results

RUN = "runs/keeper-seed0-default"


def test_a_sound_folder_verifies(results: Path) -> None:
    report = verify_results(results)
    assert report.ok, str(report)
    # Four complete runs of 4 x 3 cells, and Finetune with its row 0 and diagonal.
    assert report.runs == 5 and report.scores == 4 * 12 + 6
    assert str(report).startswith("verified 5 runs, 54 scores from raw predictions, ")


def edit(file: str, old: str, new: str) -> Callable[[Path], None]:
    def change(results: Path) -> None:
        path = results / file
        text = path.read_text()
        assert old in text, text
        path.write_text(text.replace(old, new, 1))

    return change


def edit_lines(file: str, change_rows: Callable[[list[dict[str, Any]]], object]) -> Callable[[Path], None]:
    def change(results: Path) -> None:
        path = results / file
        rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
        change_rows(rows)
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))

    return change


def edit_result(change_result: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def change(results: Path) -> None:
        path = results / RUN / "result.json"
        result = json.loads(path.read_text())
        change_result(result)
        path.write_text(json.dumps(result))

    return change


PREDICTIONS, REFERENCES = f"{RUN}/predictions.jsonl.gz", f"{RUN}/references.jsonl.gz"

CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a score in the matrix": (
        edit(f"{RUN}/matrix.csv", "3,100.0,75.0,100.0", "3,100.0,76.0,100.0"),
        f"{RUN}/matrix.csv: stage 3, task words: stored 76.0, recomputed 75.0",
    ),
    "a late digit in the matrix": (
        edit(f"{RUN}/matrix.csv", "3,100.0,75.0,100.0", "3,100.0,75.00001,100.0"),
        f"{RUN}/matrix.csv: stage 3, task words: stored 75.00001, recomputed 75.0",
    ),
    "a cell without predictions": (
        edit("runs/finetune-seed0-default/matrix.csv", "1,100.0,,", "1,100.0,50.0,"),
        "runs/finetune-seed0-default/matrix.csv: stage 1, task words: stored 50.0, recomputed not measured",
    ),
    "a score taken out": (
        edit(f"{RUN}/matrix.csv", "3,100.0,75.0,100.0", "3,100.0,,100.0"),
        f"{RUN}/matrix.csv: stage 3, task words: stored not measured, recomputed 75.0",
    ),
    "a prediction": (
        edit_lines(PREDICTIONS, lambda rows: rows[-1].update(prediction="A")),
        f"{RUN}/matrix.csv: stage 3, task letters: stored 100.0, recomputed 75.0",
    ),
    "a prediction left out": (
        edit_lines(PREDICTIONS, lambda rows: rows.pop()),
        f"{PREDICTIONS}: stage 3, task letters: stored 3 predictions, recomputed 4 references (differ in 'letters3')",
    ),
    "a prediction twice": (
        edit_lines(PREDICTIONS, lambda rows: rows.append(rows[-1])),
        f"{PREDICTIONS}: stage 3, task letters: stored 5 predictions, recomputed 4 ids",
    ),
    "a prediction of no task": (
        edit_lines(PREDICTIONS, lambda rows: rows.append({**rows[-1], "task": "other"})),
        f"{PREDICTIONS}: stage 3, task other: stored predictions, recomputed no such cell",
    ),
    "a prediction of no stage": (
        edit_lines(PREDICTIONS, lambda rows: rows.append({**rows[-1], "stage": 4})),
        f"{PREDICTIONS}: stage 4, task letters: stored predictions, recomputed no such cell",
    ),
    "a reference": (
        edit_lines(REFERENCES, lambda rows: rows[4].update(answers=["Asia"])),
        f"{RUN}/matrix.csv: stage 3, task words: stored 75.0, recomputed 50.0",
    ),
    "a metric": (
        edit_lines(REFERENCES, lambda rows: [row.update(metric="bleu") for row in rows[4:8]]),
        f"{REFERENCES}: stage 0, task words: stored bleu, recomputed metric: got 'bleu'; expected one of ",
    ),
    "a version of a metric": (
        edit_lines(REFERENCES, lambda rows: [row.update(metric_version=9) for row in rows[4:8]]),
        f"{REFERENCES}: stage 0, task words: stored exact_match, recomputed exact_match: got version 9; expected one "
        "of 1, 2. Install a newer release.",
    ),
    "references that the metric refuses": (
        edit_lines(REFERENCES, lambda rows: [row.update(metric="cider") for row in rows[4:8]]),
        f"{REFERENCES}: stage 0, task words: stored cider, recomputed cider: all 4 test samples have the same "
        "references ['Europe']",
    ),
    "a route": (
        edit_lines(PREDICTIONS, lambda rows: rows[-1].update(route=["words", "letters"])),
        f"{RUN}/result.json: routing.3.routing_accuracy: stored 0.75, recomputed 0.6666666666666666",
    ),
    "a routing share": (
        edit_result(lambda r: r["routing"]["2"].update(base_model_share=0.0)),
        f"{RUN}/result.json: routing.2.base_model_share: stored 0.0, recomputed 0.25",
    ),
    "the routing of the summary": (
        edit_result(lambda r: r["summary"].update(routing_accuracy=1.0)),
        f"{RUN}/result.json: summary.routing_accuracy: stored 1.0, recomputed 0.75",
    ),
    "a well-formed share": (
        edit_result(lambda r: r["well_formed"]["1"].update(boxes=0.5)),
        f"{RUN}/result.json: well_formed.1.boxes: stored 0.5, recomputed 1.0",
    ),
    "an aggregate of the run": (
        edit_result(lambda r: r["summary"].update(BWT=0.0 if r["summary"]["BWT"] else 1.0)),
        f"{RUN}/result.json: summary.BWT: stored 1.0, recomputed 0.0",
    ),
    "a parameter count": (
        edit_result(lambda r: r["summary"].update(trainable_parameters=999)),
        f"{RUN}/result.json: summary.trainable_parameters: stored 999, recomputed 1000",
    ),
    "an aggregate of the summary": (
        edit("summary.csv", "keeper,0,default,66.", "keeper,0,default,67."),
        "summary.csv: row keeper 0 default, AVG: stored 67.",
    ),
    "a time of the summary": (
        edit("summary.csv", "12.5", "11.5"),
        "summary.csv: row keeper 0 default, train_seconds: stored 11.5, recomputed 12.5",
    ),
    "an aggregate that is not defined": (
        edit("summary.csv", "finetune,0,default,,", "finetune,0,default,50.0,"),
        "summary.csv: row finetune 0 default, AVG: stored 50.0, recomputed nothing",
    ),
    "a seed of the summary": (
        edit("summary.csv", "keeper,0", "keeper,7"),
        "summary.csv: row keeper 7 default: stored a row, recomputed no finished run",
    ),
    "a step time": (
        edit("profile.csv", "keeper,0,default,20.0", "keeper,0,default,19.0"),
        "profile.csv: row keeper 0 default, step_ms: stored 19.0, recomputed 20.0",
    ),
    "a run without a step time": (
        edit("profile.csv", "keeper,0,default,20.0,", "keeper,2,default,20.0,"),
        "profile.csv: row keeper 0 default: stored no row, recomputed a row",
    ),
    "a loss left out": (
        edit(f"{RUN}/losses.csv", "2,words,1,1.0\n", ""),
        f"{RUN}/losses.csv: stage 2, step: stored 2, recomputed 1",
    ),
    "a loss that is no number": (
        edit(f"{RUN}/losses.csv", "2,words,1,1.0", "2,words,1,nan"),
        f"{RUN}/losses.csv: stage 2, step 1, loss: stored nan, recomputed a finite number",
    ),
    "the configuration": (
        edit(f"{RUN}/config.json", '"identity": {"method": "keeper"', '"identity": {"method": "kept"'),
        f"{RUN}/config.json: fingerprint: stored ",
    ),
    "the tasks of the configuration": (
        edit(f"{RUN}/config.json", '"boxes", "words"', '"words", "boxes"'),
        f"{RUN}/config.json: tasks: stored ['words', 'boxes', 'letters'], recomputed ['boxes', 'words', 'letters']",
    ),
    "the folder": (
        lambda results: (results / RUN).rename(results / "runs" / "keeper-seed2-default") and None,
        "config.json: folder: stored keeper-seed2-default, recomputed keeper-seed0-default",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_edit_is_caught(results: Path, case: str) -> None:
    change, expected = CASES[case]
    change(results)
    report = verify_results(results)
    assert not report.ok
    assert any(expected in str(difference) for difference in report.differences), str(report)
    assert str(report).splitlines()[-1].startswith("checked 5 runs, ")


def test_a_run_is_scored_with_the_versions_that_it_stores(results: Path) -> None:
    # The letters that version 2 reads behind markdown, and version 1, which results without a version have, does not.
    bold = edit_lines(
        PREDICTIONS, lambda rows: [row.update(prediction="**B**") for row in rows if row["prediction"] == "B"]
    )
    bold(results)
    old = verify_results(results)
    assert f"{RUN}/matrix.csv: stage 3, task letters: stored 100.0, recomputed 0.0" in map(str, old.differences)
    edit_lines(REFERENCES, lambda rows: [row.update(metric_version=2) for row in rows if row["task"] == "letters"])(
        results
    )
    new = verify_results(results)
    assert new.ok, str(new)


def test_two_versions_in_one_task_are_refused(results: Path) -> None:
    edit_lines(REFERENCES, lambda rows: rows[4].update(metric_version=2))(results)
    assert "task 'words' has an id twice or several metrics" in str(verify_results(results))


def truncate(file: str) -> Callable[[Path], None]:
    def change(results: Path) -> None:
        path = results / file
        path.write_bytes(path.read_bytes()[:-9])

    return change


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated predictions": (truncate(PREDICTIONS), "predictions.jsonl.gz: is damaged"),
    "truncated references": (truncate(REFERENCES), "references.jsonl.gz: is damaged"),
    "truncated result": (truncate(f"{RUN}/result.json"), "result.json: is not JSON"),
    "missing environment": (lambda r: (r / RUN / "environment.json").unlink(), "environment.json: cannot be read"),
    "missing matrix": (lambda r: (r / RUN / "matrix.csv").unlink(), "matrix.csv: cannot be read"),
    "a word in the matrix": (
        edit(f"{RUN}/matrix.csv", "75.0", "good"),
        "matrix.csv:4: cell is 'good'; expected a number",
    ),
    "infinity in the matrix": (edit(f"{RUN}/matrix.csv", "75.0", "inf"), "cell is 'inf'; expected a number or nothing"),
    "a short row": (edit(f"{RUN}/matrix.csv", "3,100.0,", "3,"), "matrix.csv:5: has 3 cells; expected 4"),
    "a stage twice": (edit(f"{RUN}/matrix.csv", "3,100.0", "2,100.0"), "matrix.csv:5: stage is '2'; expected 0..3"),
    "a header": (
        edit(f"{RUN}/matrix.csv", "stage,", "row,"),
        "matrix.csv:1: header is row,boxes,words,letters; expected",
    ),
    "missing summary": (lambda r: (r / "summary.csv").unlink(), "summary.csv: cannot be read"),
    "summary without seeds": (
        edit("summary.csv", "method,seed", "method,sead"),
        "summary.csv: header: stored method,sead",
    ),
    "result without summary": (
        edit(f"{RUN}/result.json", '"summary"', '"sumary"'),
        "expected an object with the key 'summary'",
    ),
    "summary without method": (edit(f"{RUN}/result.json", '"method"', '"methd"'), "result.json: summary has no method"),
    "a number as prediction": (
        edit_lines(PREDICTIONS, lambda rows: rows[0].update(prediction=3)),
        "predictions.jsonl.gz:1: a value has the wrong type",
    ),
    "a prediction without route": (
        edit_lines(PREDICTIONS, lambda rows: rows[0].pop("route")),
        "predictions.jsonl.gz:1: expected an object with stage, task, id, prediction, route",
    ),
    "a reference without answers": (
        edit_lines(REFERENCES, lambda rows: rows[1].update(answers=[])),
        "references.jsonl.gz:2: a value has the wrong type",
    ),
    "a reference twice": (
        edit_lines(REFERENCES, lambda rows: rows.append(rows[0])),
        "references.jsonl.gz: task 'boxes' has an id twice",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_and_the_other_runs_are_still_verified(results: Path, case: str) -> None:
    change, expected = DAMAGE[case]
    change(results)
    report = verify_results(results)
    assert any(expected in str(difference) for difference in report.differences), str(report)
    assert report.runs == 5 and report.scores >= 3 * 12 + 6


def test_nothing_to_verify_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="has no finished run .*; expected a folder that `dmole run` has written"):
        verify_results(tmp_path)


def test_predictions_may_hold_line_separators(results: Path) -> None:
    path = results / PREDICTIONS
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    rows[0]["prediction"] = "one\u2028two\x85three"
    path.write_bytes(gzip.compress("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()))
    assert read_predictions(results / RUN)[0].prediction == "one\u2028two\x85three"
    assert verify_results(results).differences[0].cell == "well_formed.0.boxes"


def test_runs_are_read_whole(results: Path) -> None:
    runs = read_runs(results)
    assert [(run.method, run.seed, run.order) for run in runs] == [
        ("finetune", 0, "default"), ("keeper", 0, "default"), ("keeper", 1, "default"),
        ("loser", 0, "default"), ("loser", 1, "default"),
    ]  # fmt: skip
    assert runs[1].tasks == ("boxes", "words", "letters") and runs[1].matrix.shape == (4, 3)
