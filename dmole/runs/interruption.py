# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM during a run: the step in progress ends, a checkpoint is saved, and the run says how to go on.

    with StopSignals() as stop:
        for step in ...:
            train(step)
            if stop.requested:
                save()
                raise stop.interrupted("at step 7 of 12; a checkpoint is saved")

The first signal only sets `requested`, so no file and no optimizer step is left half-done. A second one ends the
process at once: what was computed since the last checkpoint is computed again.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = b"\nstopping: the step in progress ends and a checkpoint is saved (once more: stop at once)\n"


class Interrupted(Exception):
    """A run was stopped by a signal and can go on. `number` is the signal's."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.number = number


class StopSignals:
    """Catches SIGINT and SIGTERM while it is entered; earlier handlers are put back afterwards.

    Python delivers signals to the main thread only; in another thread this catches nothing. A signal that the process
    was started to ignore (`nohup`, a shell's background job) stays ignored.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._earlier[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        self.requested = number
        # Not print: the handler may run inside a write to the same stream.
        os.write(2, NOTICE)

    def interrupted(self, where: str) -> Interrupted:
        """The exception that ends the run; `where` says how far it came and what is saved."""
        assert self.requested is not None
        return Interrupted(f"stopped by {signal.Signals(self.requested).name}: {where}", self.requested)
