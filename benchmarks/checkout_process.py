# SPDX-License-Identifier: Apache-2.0
"""A worker script that runs with the code of one checkout and answers a line for each line that it is sent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


class CheckoutProcess:
    """`script` on one thread, with `checkout` as its directory and first on its path.

    Its cache is in the checkout: two versions that share one would build their data in place of each other's.

    Attributes:
        greeting: the line that the script prints when it is ready.
    """

    def __init__(self, checkout: Path, script: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1",
                               "DMOLE_CACHE": str(checkout / "build" / "cache")},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.greeting = self._line()

    def ask(self, line: str) -> str:
        """The script's answer to `line`. Raises RuntimeError if the script has ended."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self._line()

    def close(self) -> None:
        """Ends the script by closing its input, and waits for it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with code {self.process.wait()}; its error is above.")
        return line
