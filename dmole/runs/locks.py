# SPDX-License-Identifier: Apache-2.0
"""One command at a time on a run: a lock of the operating system for each, which ends with its process.

    <output>/.locks/<run>.lock    held from before the run's settings are compared until its results are written
    <output>/.locks/<run>.json    pid and host of the holder, for the message that refuses a second command

A process that was killed leaves both files and no lock, so nothing has to be deleted by hand.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from dmole.files import write_json

LOCKS = ".locks"


class LockedError(ValueError):
    """Another command works on the run; the message says which."""


@contextlib.contextmanager
def locked(output: Path, names: Sequence[str]) -> Iterator[None]:
    """Hold the locks of the runs `names` below `output`. LockedError at once if another process holds one."""
    with contextlib.ExitStack() as held:
        for name in sorted(names):
            (output / LOCKS).mkdir(parents=True, exist_ok=True)
            owner = output / LOCKS / f"{name}.json"
            try:
                held.enter_context(FileLock(output / LOCKS / f"{name}.lock", timeout=0))
            except Timeout:
                raise LockedError(
                    f"{output / 'runs' / name} is in use by {_described(owner)}; expected one command at a time on a "
                    "run. Wait until it ends, stop it, or choose another --output."
                ) from None
            write_json(owner, {"pid": os.getpid(), "host": platform.node()})
            held.callback(owner.unlink, missing_ok=True)
        yield


@contextlib.contextmanager
def summary_lock(output: Path) -> Iterator[None]:
    """Wait until no other command writes the summary of `output`."""
    (output / LOCKS).mkdir(parents=True, exist_ok=True)
    with FileLock(output / LOCKS / "summary.lock"):
        yield


def _described(owner: Path) -> str:
    try:
        found = json.loads(owner.read_bytes())
        return f"process {found['pid']} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # it has the lock and has not written its name yet
