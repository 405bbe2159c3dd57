# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.against_commit OLD_CHECKOUT --output FILE`: this checkout's time / another's, row by row.

Two processes, one per checkout, each with its own build, run the cases of `benchmarks.summary` on one thread; batches
of calls alternate between them, and so does the order within a pair. A row is the median over the rounds of
new / old, with the quartiles. Both checkouts need a compiled extension of the same kind (or none).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.checkout_process import CheckoutProcess
from benchmarks.machine import this_machine

ROOT = Path(__file__).resolve().parents[1]


class Worker(CheckoutProcess):
    """A process with one checkout's code."""

    def __init__(self, checkout: Path) -> None:
        super().__init__(checkout, Path(__file__).with_name("commit_worker.py"))
        self.rows: list[str] = json.loads(self.greeting)

    def seconds(self, row: str, calls: int) -> float:
        return float(self.ask(f"{row} {calls}"))


def compare(old: Worker, new: Worker, *, batch_seconds: float, rounds: int) -> dict[str, dict[str, float]]:
    ratios: dict[str, dict[str, float]] = {}
    for row in [row for row in new.rows if row in old.rows]:
        calls = max(1, round(batch_seconds / max(old.seconds(row, 1), 1e-6)))
        new.seconds(row, calls)  # warm
        pairs = []
        for number in range(rounds):
            first, second = (old, new) if number % 2 == 0 else (new, old)
            times = {id(worker): worker.seconds(row, calls) for worker in (first, second)}
            pairs.append(times[id(new)] / times[id(old)])
        low, median, high = statistics.quantiles(pairs, n=4)
        ratios[row] = {"new_over_old": round(median, 4), "p25": round(low, 4), "p75": round(high, 4), "rounds": rounds}
        print(f"{row:28s} new / old {median:.3f}  ({low:.3f} to {high:.3f}, {calls} calls a batch)", file=sys.stderr)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="the root of a checkout with a build of its own")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--batch-seconds", type=float, default=0.15)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    old, new = Worker(options.old.resolve()), Worker(ROOT)
    rows = compare(old, new, batch_seconds=options.batch_seconds, rounds=options.rounds)
    machine = this_machine()
    git = ["git", "-C", str(options.old), "rev-parse", "--short=12", "HEAD"]
    old_commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    record: dict[str, Any] = {
        "rows": rows,
        "about": {
            "old": old_commit, "new": machine.commit, "machine": machine.name, "versions": machine.versions,
            "threads": 1,
        },
    }  # fmt: skip
    old.close()
    new.close()
    text = json.dumps(record, indent=2) + "\n"
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
