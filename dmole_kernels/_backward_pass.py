# SPDX-License-Identifier: Apache-2.0
"""The extent of one backward call, as its nodes see it: hooks and `torch.autograd.Function.backward`."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch


class BackwardPass:
    """Calls `finish` at the end of each outermost backward call that was entered, and `abandon` for one that raised.

    A reentrant checkpoint runs a backward call inside a backward call. The inner call is part of the outer one.
    """

    def __init__(self, finish: Callable[[], None], abandon: Callable[[], None]) -> None:
        self._finish = finish
        self._abandon = abandon
        # The running backward calls (autograd's graph tasks). Autograd owns each callback and drops it uncalled when
        # the call raises, so a dead reference is a failed call.
        self._running: dict[int, weakref.ref[Callable[[], None]]] = {}

    def enter(self) -> None:
        """Registers the backward call that runs the caller."""
        self.forget_failed()
        task = torch._C._current_graph_task_id()
        if task in self._running:
            return

        def leave() -> None:
            self._running.pop(task, None)
            if not self._running:
                self._finish()

        self._running[task] = weakref.ref(leave)
        torch.autograd.Variable._execution_engine.queue_callback(leave)

    def forget_failed(self) -> None:
        failed = [task for task, leave in self._running.items() if leave() is None]
        for task in failed:
            del self._running[task]
        if failed and not self._running:
            self._abandon()
