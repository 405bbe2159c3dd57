# SPDX-License-Identifier: Apache-2.0
"""The time that is left, estimated from what was done now; lines while a run works without a terminal."""

import io
import threading

import pytest
from rich.console import Console

from dmole.runs.progress import Costs, RunProgress, clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of `dmole.runs.progress`, which tests move."""
    moment = [100.0]
    monkeypatch.setattr("dmole.runs.progress.time.monotonic", lambda: moment[0])
    return moment


def test_time_left_counts_only_work_done_now(now: list[float]) -> None:
    with RunProgress(Console(file=io.StringIO()), total=1000.0) as progress:
        assert progress.time_left() == "?"
        progress.skip(500.0)
        assert progress.time_left() == "?"
        progress.advance(0.0)
        now[0] += 50.0
        progress.advance(100.0)
        # 0.5 s a unit, 400 to go.
        assert progress.time_left() == "3:20"
        now[0] += 3600 * 10
        assert progress.time_left().startswith("40:")


def test_the_first_estimate_leaves_one_time_work_out(now: list[float]) -> None:
    with RunProgress(Console(file=io.StringIO()), total=1000.0) as progress:
        now[0] += 600.0  # images are read, kernels loaded
        progress.advance(10.0)
        assert progress.time_left() == "?"
        now[0] += 5.0
        progress.advance(10.0)
        # 0.5 s a unit, 980 to go: 8:10. With the ten minutes of the first step it would be 8 hours.
        assert progress.time_left() == "8:10"


def test_measured_costs_give_an_estimate_at_once_and_give_way_to_what_happens(now: list[float]) -> None:
    costs = Costs(trained_sample=0.5, answer=0.1, measured=True)
    with RunProgress(Console(file=io.StringIO()), total=3600.0, costs=costs) as progress:
        assert progress.time_left() == "1:00:00"
        progress.advance(0.0)
        now[0] += 60.0
        progress.advance(30.0)
        # Twice as slow as measured, by 60 s for 30 units; the estimate counts as 30 s for 30: 90 / 60 * 3570 s.
        assert progress.time_left() == clock(1.5 * 3570)
        now[0] += 6000.0
        progress.advance(3000.0)
        assert progress.time_left() == clock((6060 + 30) / (3030 + 30) * 570)


def test_a_clock_in_words_of_hours_and_minutes() -> None:
    assert [clock(0), clock(59.6), clock(3599), clock(3600 * 40 + 12)] == ["0:00", "1:00", "59:59", "40:00:12"]


def test_a_note_is_one_line_away_from_a_terminal() -> None:
    screen = io.StringIO()
    with RunProgress(Console(file=screen, width=40), total=1.0) as progress:
        progress.describe("working")
        progress.note("a line that is longer than the [forty] columns of this console")
    assert screen.getvalue() == "a line that is longer than the [forty] columns of this console\n"


class Screen(io.StringIO):
    """Text that tells when a line that holds `awaited` is written."""

    def __init__(self, awaited: str) -> None:
        super().__init__()
        self.awaited = awaited
        self.there = threading.Event()

    def write(self, text: str) -> int:
        if self.awaited in text:
            self.there.set()
        return super().write(text)


def test_a_line_comes_while_a_single_step_works_on() -> None:
    screen = Screen("stage 2/9 maps: step 7/12, loss 0.512, ? left")
    console = Console(file=screen, width=40)
    with RunProgress(console, total=10.0, heartbeat_seconds=0.05) as progress:
        progress.describe("run: stage 2/9 maps: step 7/12, loss 0.512")
        # Nothing is called any more, as in a step that takes long.
        assert screen.there.wait(30), "no line while the step works"
    count = len(screen.getvalue().splitlines())
    assert threading.active_count() == len([t for t in threading.enumerate() if t.name != "heartbeat"])
    assert count == len(screen.getvalue().splitlines())


def test_no_lines_on_a_terminal_or_when_switched_off() -> None:
    for console, seconds in ((Console(file=io.StringIO(), force_terminal=True), 0.01), (Console(), 0.0)):
        with RunProgress(console, total=1.0, heartbeat_seconds=seconds):
            assert "heartbeat" not in {thread.name for thread in threading.enumerate()}
