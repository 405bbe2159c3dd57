# SPDX-License-Identifier: Apache-2.0
"""The admission script says what it takes, and its table shows its CSV."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from dmole.reports.admission import COLUMNS, admission_table
from dmole.reports.stored import ResultsError
from mini_cmit.tasks.build import TASKS

ROOT = Path(__file__).resolve().parent.parent


def test_the_table_shows_the_file(tmp_path: Path) -> None:
    row = dict(zip(COLUMNS, ("maps", "iou", "61.0", "20.0", "18.0", "22.0", "39.0", "yes"), strict=True))
    with (tmp_path / "admission.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS)
        writer.writeheader()
        writer.writerow(row)
    shown = admission_table(tmp_path / "admission.csv").markdown()
    assert "| maps | iou | 61.0 | 20.0 | 18.0 | 22.0 | 39.0 | yes |" in shown


def test_a_missing_or_foreign_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        ResultsError, match=r"none.csv does not exist; expected the CSV that scripts/admission.py writes"
    ):
        admission_table(tmp_path / "none.csv")
    (tmp_path / "bad.csv").write_text("task,metric\na,b\n")
    with pytest.raises(ResultsError, match="bad.csv lacks columns of task, metric, finetune"):
        admission_table(tmp_path / "bad.csv")


def test_the_committed_table_admits_every_task_of_the_benchmark() -> None:
    with (ROOT / "results" / "admission.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["task"] for row in rows] == list(TASKS)
    for row in rows:
        rivals = max(float(row[name]) for name in ("zero_shot", "text_only", "constant"))
        margin = float(row["finetune"]) - rivals
        assert float(row["margin"]) == pytest.approx(margin, abs=0.011)
        assert margin >= 10.0 and row["admitted"] == "yes", row["task"]


def test_the_script_says_what_it_takes() -> None:
    script = str(ROOT / "scripts" / "admission.py")
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--output" in shown and "--tasks" in shown
