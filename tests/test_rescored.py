# SPDX-License-Identifier: Apache-2.0
"""results/rescored.csv: the committed predictions under the metrics of today, beside what is stored."""

import csv
import io
from pathlib import Path

import pytest

from scripts import rescore

RESULTS = Path(__file__).resolve().parent.parent / "results"
FOLDERS = ("mini", "mini_matched_neighbour")


def rows() -> list[dict[str, str]]:
    with (RESULTS / "rescored.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_committed_table_is_what_the_predictions_give(capsys: pytest.CaptureFixture[str]) -> None:
    rescore.main([str(RESULTS / name) for name in FOLDERS])
    assert list(csv.DictReader(io.StringIO(capsys.readouterr().out))) == rows()


def test_every_changed_metric_of_every_method_is_in_it() -> None:
    found = {(row["results"], row["method"], row["metric"].split(" ")[0]) for row in rows() if row["metric"]}
    for method in ("dmole", "finetune", "joint", "seq_ft", "zero_shot"):
        assert {("mini", method, name) for name in ("exact_match", "option_letter", "vqa")} <= found


def test_the_new_metrics_score_the_committed_answers_as_the_old_ones_did() -> None:
    # Models that were taught bare letters and numbers write no markdown; where nothing changed, no table has to.
    assert {row["changed"] for row in rows()} == {"0"}
    assert [row["stored"] for row in rows()] == [row["rescored"] for row in rows()]
