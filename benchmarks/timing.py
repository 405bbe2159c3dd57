# SPDX-License-Identifier: Apache-2.0
"""Interleaved wall-clock timing: every round runs every provider once, in a new random order.

A slowdown of the machine for a second then affects all providers, and none always runs after the same other one.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

SHORTEST_SAMPLE = 1e-3  # seconds; a faster call is repeated within one sample


def interleaved(
    runs: Mapping[str, Callable[[], object]], *, seconds: float, min_rounds: int = 5, max_rounds: int = 100,
    wait: Callable[[], object] | None = None,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds per call, one sample a round: `samples[name][round]`.

    As many rounds as fit into `seconds`, but at least `min_rounds` and at most `max_rounds`. Two calls of
    each run before, untimed. The garbage collector is disabled meanwhile. `wait` returns when the device is idle; it is
    called before and at the end of each sample.
    """
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        calls: dict[str, int] = {}
        round_seconds = 0.0
        for name, run in runs.items():
            run()
            once = _seconds(run, 1, wait)
            calls[name] = max(1, min(1000, round(SHORTEST_SAMPLE / max(once, 1e-7))))
            round_seconds += once * calls[name]
        rounds = max(min_rounds, min(max_rounds, int(seconds / max(round_seconds, 1e-9))))
        order = list(runs)
        chance = random.Random(0)
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            chance.shuffle(order)
            for name in order:
                samples[name].append(_seconds(runs[name], calls[name], wait))
        return samples
    finally:
        if collecting:
            gc.enable()


def _seconds(run: Callable[[], object], calls: int, wait: Callable[[], object] | None) -> float:
    if wait is not None:
        wait()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if wait is not None:
        wait()
    return (time.perf_counter() - start) / calls


def percentiles_ms(samples: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80 in milliseconds."""
    p20, p50, p80 = np.percentile(np.asarray(samples) * 1e3, (20, 50, 80))
    return float(p20), float(p50), float(p80)


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over the rounds of above / below: the times of a pair were taken next to each other."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
