# SPDX-License-Identifier: Apache-2.0
"""The committed record of ten kills says what README and CHANGELOG say of it."""

import json
from pathlib import Path

RECORD = Path(__file__).resolve().parent.parent / "results" / "kill_resume.json"


def test_ten_kills_changed_no_file() -> None:
    record = json.loads(RECORD.read_text())
    assert record["equal"] is True and record["different_files"] == []
    assert record["kills"] == len(record["moments"]) == 10
    methods = ("dmole-seed0-default", "seq_ft-seed0-default")
    names = ("matrix.csv", "predictions.jsonl.gz", "references.jsonl.gz", "losses.csv")
    assert set(record["files"]) == {f"{method}/{name}" for method in methods for name in names}
    # Real kills at different moments of the run, not ten at its start.
    assert len({moment["left"] for moment in record["moments"]}) >= 5


def test_a_hundred_kills_of_the_loop_on_accelerate_changed_no_file() -> None:
    """bf16, accumulation, validation; forty of them at random file operations, inside writes of checkpoints too."""
    record = json.loads((RECORD.parent / "kill_resume_100.json").read_text())
    assert record["equal"] is True and record["different_files"] == []
    assert record["kills"] == len(record["moments"]) == 100
    assert sum("at_file_operation" in moment for moment in record["moments"]) == 40
    assert len(record["files"]) == 8
    assert len({moment["left"] for moment in record["moments"]}) >= 10
