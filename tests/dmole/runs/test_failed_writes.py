# SPDX-License-Identifier: Apache-2.0
"""Every write of a run fails once, as in SQLite's tests: resumed, the run ends with the bytes of an undisturbed one.

A write is a file opened for writing, a folder made, a rename or a sync, below the output folder.
"""

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dmole.config import RunConfig
from dmole.reports.verify import verify_results
from dmole.runs.runner import run

EVENTS = ("open", "os.mkdir", "os.rename")


class Failures:
    """Counts the writes below `folder` and lets number `fail_at` (from 1) fail as on a full disk; 0: none."""

    def __init__(self) -> None:
        self.folder, self.seen, self.fail_at = "", 0, 0

    def write(self, name: str) -> None:
        self.seen += 1
        if self.seen == self.fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folder or event not in EVENTS or not str(arguments[0]).startswith(self.folder):
            return
        if event != "open" or (arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            self.write(str(arguments[0]))


FAILURES = Failures()
sys.addaudithook(FAILURES.hook)  # which nobody can take away again: without a folder it does nothing


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> Iterator[Failures]:
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        if FAILURES.folder:
            FAILURES.write("fsync")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    yield FAILURES
    FAILURES.folder = ""


def attempt(config: RunConfig, failures: Failures, fail_at: int) -> int:
    """Runs with one failing write; how many writes there were until it ended."""
    failures.folder, failures.seen, failures.fail_at = str(config.output), 0, fail_at
    try:
        run(config, console=Console(file=io.StringIO()))
    except OSError as error:
        assert error.errno == errno.ENOSPC
    finally:
        failures.folder = ""
    return failures.seen


def numbers(output: Path) -> dict[str, bytes]:
    names = ("matrix.csv", "predictions.jsonl.gz", "references.jsonl.gz", "losses.csv", "matrix.png")
    found = {f"{name}": (folder / name).read_bytes() for folder in output.glob("runs/*") for name in names}
    for path in output.glob("runs/*/model/**/*.safetensors"):
        found[path.relative_to(output).as_posix()] = path.read_bytes()
    return found


def check_every(config: RunConfig, root: Path, failures: Failures, *, step: int) -> None:
    whole = config.replace(output=str(root / "whole"))
    count = attempt(whole, failures, 0)
    expected = numbers(root / "whole")
    for number in range(count, 0, -step):
        disturbed = config.replace(output=str(root / f"disturbed{number}"))
        attempt(disturbed, failures, number)
        run(disturbed, console=Console(file=io.StringIO()))
        output = Path(disturbed.output)
        assert numbers(output) == expected, number
        left = [path for path in output.rglob("*") if path.name.endswith((".partial", ".old"))]
        left += [*output.glob("runs/*/checkpoints"), *output.glob("runs/*/stages")]
        assert not left, (number, left)
        assert verify_results(output).ok, number


@pytest.mark.parametrize(("method", "step"), [("zero_shot", 11), ("seq_ft", 31)])
def test_a_run_survives_failed_writes(
    toy_config: Callable[..., RunConfig], tmp_path: Path, failures: Failures, method: str, step: int
) -> None:
    check_every(toy_config(f"methods=[{method}]"), tmp_path, failures, step=step)


@pytest.mark.long
@pytest.mark.parametrize("method", ["zero_shot", "dmole"])
def test_a_run_survives_each_failed_write(
    toy_config: Callable[..., RunConfig], tmp_path: Path, failures: Failures, method: str
) -> None:
    check_every(toy_config(f"methods=[{method}]"), tmp_path, failures, step=1)
