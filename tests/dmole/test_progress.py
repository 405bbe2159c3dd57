# SPDX-License-Identifier: Apache-2.0
"""The time that is left, estimated from what was done now."""

import io

import pytest
from rich.console import Console

from dmole.progress import RunProgress


def test_time_left_counts_only_work_done_now(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("dmole.progress.time.monotonic", lambda: clock[0])
    with RunProgress(Console(file=io.StringIO()), total=1000.0) as progress:
        assert progress.time_left() == "?"
        progress.skip(500.0)
        assert progress.time_left() == "?"
        clock[0] += 50.0
        progress.advance(100.0)
        # 0.5 s a unit, 400 to go.
        assert progress.time_left() == "3:20"
        clock[0] += 3600 * 10
        assert progress.time_left().startswith("40:")


def test_a_note_is_one_line_away_from_a_terminal() -> None:
    screen = io.StringIO()
    with RunProgress(Console(file=screen, width=40), total=1.0) as progress:
        progress.describe("working")
        progress.note("a line that is longer than the forty columns of this console")
    assert screen.getvalue() == "a line that is longer than the forty columns of this console\n"
