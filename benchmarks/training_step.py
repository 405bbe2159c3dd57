# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.training_step OLD_CHECKOUT`: a training step of this checkout / of another, on the mini demo.

    git worktree add /tmp/old COMMIT && cp dmole_kernels/*.so /tmp/old/dmole_kernels/

Two processes, one per checkout, take turns of a few steps each on one thread, and the order of each pair alternates. A
row is the median over the rounds of new / old, with the quartiles. Both use the compiled kernels that they find.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.machine import this_machine

ROOT = Path(__file__).resolve().parents[1]


class Side:
    """A process with one checkout's code."""

    def __init__(self, checkout: Path, method: str, precision: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("step_worker.py")), method, precision],
            cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._answer()

    def seconds(self, steps: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with code {self.process.wait()}; its error is above.")
        return line

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(old: Side, new: Side, *, rounds: int, steps: int) -> dict[str, float]:
    """The ratio's quartiles over the rounds, and the median milliseconds of a step of each."""
    for side in (old, new):
        side.seconds(steps)  # what the first steps prepare
    pairs = []
    for turn in range(rounds):
        seconds = {side: side.seconds(steps) for side in ((old, new) if turn % 2 else (new, old))}
        pairs.append((seconds[old], seconds[new]))
    low, middle, high = statistics.quantiles([after / before for before, after in pairs], n=4)
    return {
        "ratio": round(middle, 4),
        "ratio_p25": round(low, 4),
        "ratio_p75": round(high, 4),
        "old_ms": round(1000 * statistics.median(before for before, _ in pairs) / steps, 2),
        "new_ms": round(1000 * statistics.median(after for _, after in pairs) / steps, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path, help="checkout of the commit to compare with")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4, help="of one turn")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = {}
    for method in ("seq_ft", "dmole"):
        for precision in ("bf16", "fp32"):
            sides = [Side(checkout.resolve(), method, precision) for checkout in (options.old, ROOT)]
            rows[f"{method}_{precision}"] = compare(*sides, rounds=options.rounds, steps=options.steps)
            print(f"{method}_{precision}", rows[f"{method}_{precision}"], flush=True)
            for side in sides:
                side.close()
    if options.output is not None:
        found = {"rows": rows, "rounds": options.rounds, "steps": options.steps, "machine": vars(this_machine())}
        options.output.write_text(json.dumps(found, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
