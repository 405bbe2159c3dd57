# SPDX-License-Identifier: Apache-2.0
"""Which experts are in memory: unload one to disk, read it again when a route asks for it.

Requests may run in many threads while experts come and go: a request holds `using`, a change waits until no request
runs and keeps new ones out meanwhile.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Residency:
    """Many readers or one writer. A waiting writer takes precedence over new readers, so requests cannot starve it."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers = 0
        self._waiting = 0
        self._writing = False

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Around a request: the experts stay as they are."""
        with self._condition:
            self._condition.wait_for(lambda: not self._writing and not self._waiting)
            self._readers += 1
        try:
            yield
        finally:
            with self._condition:
                self._readers -= 1
                self._condition.notify_all()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Around a change of the experts: no request runs. Not inside `using` of the same thread."""
        with self._condition:
            self._waiting += 1
            self._condition.wait_for(lambda: not self._writing and not self._readers)
            self._waiting -= 1
            self._writing = True
        try:
            yield
        finally:
            with self._condition:
                self._writing = False
                self._condition.notify_all()
