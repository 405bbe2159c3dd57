# SPDX-License-Identifier: Apache-2.0
"""Progress of a run with the time that is left: a live bar on a terminal, a line every so many seconds elsewhere.

    left = (seconds + P) / (units + P) * units left        with measured costs, whose units are expected seconds
    left = seconds / units * units left                    without

`units` is the work done since the first step or batch was finished, `seconds` the time that it took. The first one is
left out because it holds what is done once: loading kernels, computing the features of images, filling caches. P is how
many seconds of work the estimate before the start counts for.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

PRIOR_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Units of work of one sample trained and one answer generated.

    `measured`: the units are seconds on this machine (`dmole.runs.estimate`). Otherwise they are relative: on the mini
    model with one thread, 49 ms to train on a sample and 16 ms to answer one.
    """

    trained_sample: float = 3.0
    answer: float = 1.0
    measured: bool = False


class RunProgress:
    """Counts units of work over all runs of a command; use as a context manager.

    Args:
        total: The units of everything that the command does.
        heartbeat_seconds: Away from a terminal, the longest time without a line; 0 prints no such lines.
    """

    def __init__(
        self, console: Console, total: float, *, costs: Costs | None = None, heartbeat_seconds: float = 0.0
    ) -> None:
        self.console = console
        self.total = total
        self.costs = costs or Costs()
        self.done = 0.0
        # Work of an earlier process and of the first step: it must not make the rest look fast, or slow.
        self._uncounted = 0.0
        self._counted_from: float | None = None
        self._status = "preparing"
        self._interval = 0.0 if console.is_terminal else heartbeat_seconds
        self._last_line = time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(self._status, total=total, left="")

    def __enter__(self) -> RunProgress:
        self._bar.start()
        if self._interval > 0:
            # A thread, because a single step of a large model may take longer than the interval.
            self._thread = threading.Thread(target=self._heartbeat, name="heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._bar.stop()

    def _heartbeat(self) -> None:
        while True:
            due = self._last_line + self._interval - time.monotonic()
            if self._ended.wait(max(0.0, due)):
                return
            if time.monotonic() - self._last_line >= self._interval:
                self.note(f"{self._status}, {self.time_left()} left")

    def describe(self, text: str) -> None:
        """What is being done now: the bar's text, and the heartbeat's."""
        self._status = text
        self._bar.update(self._task, description=text)

    def advance(self, units: float) -> None:
        """Work that was done now."""
        if self._counted_from is None:
            self._counted_from = time.monotonic()
            self._uncounted += units
        self.done += units
        self._bar.update(self._task, advance=units, left=f"{self.time_left()} left")

    def skip(self, units: float) -> None:
        """Work that an earlier process did."""
        self.done += units
        self._uncounted += units
        self._bar.update(self._task, advance=units)

    def time_left(self) -> str:
        """An estimate such as "3:05"; "?" before there is anything to go by."""
        units = self.done - self._uncounted
        seconds = 0.0 if self._counted_from is None else time.monotonic() - self._counted_from
        if self.costs.measured:
            units, seconds = units + PRIOR_SECONDS, seconds + PRIOR_SECONDS
        if units <= 0:
            return "?"
        return clock(seconds / units * max(0.0, self.total - self.done))

    def note(self, text: str) -> None:
        """A line that stays."""
        self._last_line = time.monotonic()
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def clock(seconds: float) -> str:
    """Minutes and seconds, or hours, minutes and seconds: "3:05", "40:00:12"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
