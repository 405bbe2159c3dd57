# SPDX-License-Identifier: Apache-2.0
"""The committed table of the admission rule follows the rule, and the script says what it takes."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from mini_cmit.tasks.build import TASKS

ROOT = Path(__file__).resolve().parent.parent


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
