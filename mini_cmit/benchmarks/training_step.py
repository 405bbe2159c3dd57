# SPDX-License-Identifier: Apache-2.0
"""`python -m mini_cmit.benchmarks.training_step OLD_CHECKOUT`: a training step of this checkout / of another.

On the mini demo:

    git worktree add OLD_CHECKOUT COMMIT && cp dmole_kernels/*.so OLD_CHECKOUT/dmole_kernels/

Two processes, one per checkout, take turns of a few steps each on one thread, and the order of each pair alternates. A
row is the median over the rounds of new / old, with the quartiles. Both use the compiled kernels that they find.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from benchmarks.checkout_process import CheckoutProcess
from benchmarks.machine import this_machine

ROOT = Path(__file__).resolve().parents[2]


class Side(CheckoutProcess):
    """A process with one checkout's code."""

    def __init__(self, checkout: Path, method: str, precision: str) -> None:
        super().__init__(checkout, Path(__file__).with_name("step_worker.py"), method, precision)

    def seconds(self, steps: int) -> float:
        return float(self.ask(str(steps)))


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
