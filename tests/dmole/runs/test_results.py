# SPDX-License-Identifier: Apache-2.0
"""The files of a run: tables with empty cells, lines that are the same every time, routing counted by hand."""

import json
import math
from pathlib import Path

import numpy as np

from dmole.reports.routing_statistics import routing_statistics
from dmole.runs.evaluation import Prediction
from dmole.runs.results import (
    SUMMARY_COLUMNS,
    aggregate_columns,
    matrix_of,
    write_csv,
    write_lines,
    write_matrix,
    write_summary,
)


def said(task: str, route: tuple[str, ...] | None) -> Prediction:
    return Prediction(task=task, id=f"{task}{route}", text="", route=route, cut=False)


def test_routing_by_hand() -> None:
    predictions = [
        said("a", ("a",)),
        said("a", ("b", "a")),
        said("a", ()),
        said("b", ("b", "a")),
        said("c", ()),
        said("c", ("a",)),
    ]
    assert routing_statistics(predictions, ["a", "b"]) == {
        "samples": 4,
        "routing_accuracy": 0.5,
        "routing_accuracy_any": 0.75,
        "base_model_share": 0.25,
        "unseen_base_model_share": 0.5,
    }
    assert "unseen_base_model_share" not in (routing_statistics(predictions, ["a", "b", "c"]))
    assert routing_statistics([said("a", None)], ["a"]) == {}


def test_matrix_with_cells_that_were_not_measured(tmp_path: Path) -> None:
    matrix = matrix_of({0: {"a": 1.0, "b": 1 / 3}, 2: {"b": 50.0, "a": 0.0}}, ["a", "b"])
    assert np.isnan(matrix[1]).all()
    write_matrix(tmp_path / "m.csv", matrix, ["a", "b"])
    assert (tmp_path / "m.csv").read_text() == "stage,a,b\n0,1.0,0.3333333333333333\n1,,\n2,0.0,50.0\n"


def test_aggregates_are_none_where_undefined() -> None:
    zero_shot = matrix_of({0: {"a": 4.0, "b": 6.0}}, ["a", "b"])
    assert aggregate_columns(zero_shot, [0, 0]) == {"AVG": None, "Last": 5.0, "BWT": None}
    # The same cells of a method that ends with row 2: its last scores were not measured.
    assert aggregate_columns(zero_shot, [2, 2]) == {"AVG": None, "Last": None, "BWT": None}
    diagonal = matrix_of({1: {"a": 4.0}, 2: {"b": 6.0}}, ["a", "b"])
    assert aggregate_columns(diagonal, [1, 2]) == {"AVG": None, "Last": 5.0, "BWT": None}
    assert aggregate_columns(diagonal, [2, 2]) == {"AVG": None, "Last": None, "BWT": None}
    whole = matrix_of({1: {"a": 4.0, "b": 1.0}, 2: {"a": 2.0, "b": 6.0}}, ["a", "b"])
    # AVG (4 + 2 + 1 + 6) / 4, Last (2 + 6) / 2, BWT 2 - 4; row 0 is in none of them.
    assert aggregate_columns(whole, [2, 2]) == {"AVG": 3.25, "Last": 4.0, "BWT": -2.0}


def test_cells(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", ("a", "b", "c"), [(None, math.nan, "x,y"), (1, 0.1, "z")])
    assert (tmp_path / "t.csv").read_text() == 'a,b,c\n,,"x,y"\n1,0.1,z\n'


def test_equal_lines_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_lines(tmp_path / name, [{"text": "é\u2028"}])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_step_times_are_compared_within_seed_and_order(tmp_path: Path) -> None:
    for method, seed, step in (("seq_ft", 0, 10.0), ("dmole", 0, 15.0), ("dmole", 1, 20.0), ("zero_shot", 0, None)):
        parts = {} if step is None else {"data": 1.0, "forward": step - 1.0}
        row = dict.fromkeys(SUMMARY_COLUMNS, None) | {"method": method, "seed": seed, "order": "default"}
        profile = {"step_ms": step, "step_ms_by_part": parts, "evaluation_seconds": 2.0}
        folder = tmp_path / "runs" / f"{method}-seed{seed}-default"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"summary": row, "profile": profile}))
    write_summary(tmp_path)
    lines = (tmp_path / "profile.csv").read_text().splitlines()
    assert (
        lines[0]
        == "method,seed,order,data_ms,forward_ms,backward_ms,optimizer_ms,step_ms,times_seq_ft,evaluation_seconds"
    )
    assert lines[1:] == [
        "dmole,0,default,1.0,14.0,0.0,0.0,15.0,1.5,2.0",
        "dmole,1,default,1.0,19.0,0.0,0.0,20.0,,2.0",
        "seq_ft,0,default,1.0,9.0,0.0,0.0,10.0,1.0,2.0",
    ]
    assert (tmp_path / "summary.csv").read_text().splitlines()[0] == ",".join(SUMMARY_COLUMNS)
