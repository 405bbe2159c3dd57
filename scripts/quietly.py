# SPDX-License-Identifier: Apache-2.0
"""Run a command with its output in a log file; one line on the terminal, and the log's tail if the command fails.

    python scripts/quietly.py --log build/kernels.log --what "compiled kernels" -- python setup.py build_ext --inplace

Prints "compiled kernels: done in 3:05". Lines of the command that begin with `--show`'s text are printed too. A command
that goes on without what failed says so with `--trouble`'s text: then the tail is shown although its status is 0. Exits
with the command's status.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

TAIL = 30


def run(command: Sequence[str], log: Path, what: str, *, show: str = "", trouble: str = "") -> int:
    """The exit status of `command`, whose output is in `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    print(f"{what}: started, output in {log}", flush=True)
    with log.open("wb") as file:
        try:
            status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
        except OSError as error:
            file.write(f"{command[0]}: {error.strerror}\n".encode())
            status = 127
    lines = log.read_text(errors="replace").splitlines()
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    for line in lines:
        if show and line.startswith(show):
            print(line, flush=True)
    troubled = bool(trouble) and any(trouble in line for line in lines)
    if status == 0 and not troubled:
        print(f"{what}: done in {minutes}:{seconds:02d}", flush=True)
        return 0
    print(
        f"{what}: {'trouble' if status == 0 else f'failed with status {status}'}: {shlex.join(command)}",
        file=sys.stderr,
    )
    print(f"the last {min(TAIL, len(lines))} of {len(lines)} lines of {log}:", file=sys.stderr)
    print("\n".join(lines[-TAIL:]), file=sys.stderr, flush=True)
    return status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--log", type=Path, required=True, help="the file for the output")
    parser.add_argument("--what", required=True, help="what the lines on the terminal call it")
    parser.add_argument("--show", default="", help="print the output's lines that begin with this text")
    parser.add_argument("--trouble", default="", help="text that says that something failed")
    parser.add_argument("command", nargs="+", help="after --")
    given = parser.parse_args()
    sys.exit(run(given.command, given.log, given.what, show=given.show, trouble=given.trouble))


if __name__ == "__main__":
    main()
