# SPDX-License-Identifier: Apache-2.0
"""One case and its providers: each is checked against float64 first, then timed interleaved, then written as a CSV row.

A provider whose results are wrong gets no row; neither does one that cannot run the case. Both are reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.machine import Machine
from benchmarks.memory import peak_memory_mib
from benchmarks.records import Row
from benchmarks.timing import interleaved, paired_ratio, percentiles_ms
from dmole_kernels.testing import dtype_name
from dmole_kernels.testing import threads as with_threads


class CannotTake(Exception):
    """A baseline cannot run this case; the message gives the reason."""


@dataclass(frozen=True, kw_only=True)
class Provider:
    """`run` is timed; `judge` returns the errors found in its results, one a line (none: it is correct).

    `flops` is the work that the case requires, not what the provider spends.
    """

    name: str
    run: Callable[[], object]
    judge: Callable[[], Sequence[str]]
    flops: float


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """`base` is the provider whose time is subtracted from the others' to get their overhead; None subtracts 0."""

    case: str
    dtype: torch.dtype
    direction: str
    threads: int
    providers: Sequence[Provider]
    base: str | None = None
    added_flops: float = 0.0
    added_bytes: float = 0.0
    base_bytes: float = 0.0
    device: str = "cpu"
    refusals: Sequence[str] = ()


@dataclass
class Outcome:
    """`samples[provider]` in seconds per call, equally many for each; `wrong` providers have none."""

    benchmark: Benchmark
    samples: dict[str, list[float]]
    wrong: dict[str, tuple[str, ...]]
    memory_mib: dict[str, float] = field(default_factory=dict)

    def ratio(self, above: str, below: str) -> float | None:
        """Median of above / below over the rounds; None where one of them has no samples."""
        if above not in self.samples or below not in self.samples:
            return None
        return paired_ratio(self.samples[above], self.samples[below])

    def p50_ms(self, provider: str) -> float:
        return percentiles_ms(self.samples[provider])[1]

    def rows(self, machine: Machine) -> list[Row]:
        benchmark = self.benchmark
        peak = machine.peak(benchmark.dtype, benchmark.threads)
        floor = max(benchmark.added_flops / peak, benchmark.added_bytes / machine.bandwidth(benchmark.threads))
        base_ms = self.p50_ms(benchmark.base) if benchmark.base in self.samples else None
        rows = []
        for provider in benchmark.providers:
            if provider.name not in self.samples:
                continue
            times = percentiles_ms(self.samples[provider.name])
            overhead: float | str = ""
            if provider.name != benchmark.base and floor > 0 and (benchmark.base is None or base_ms is not None):
                overhead = (times[1] - (base_ms or 0.0)) / 1e3 / floor
            rows.append(
                machine.row(
                    case=benchmark.case,
                    dtype=dtype_name(benchmark.dtype),
                    direction=benchmark.direction,
                    threads=benchmark.threads,
                    provider=provider.name,
                    times_ms=times,
                    peak_memory_mib=self.memory_mib.get(provider.name, ""),
                    peak_fraction=provider.flops / (times[1] / 1e3) / peak if provider.flops else "",
                    overhead_over_floor=overhead,
                )
            )
        return rows


def check_and_time(
    benchmark: Benchmark, *, seconds: float, min_rounds: int = 5, max_rounds: int = 100, memory: bool = True
) -> Outcome:
    """Checks every provider, then times the correct ones."""
    with with_threads(benchmark.threads):
        wrong: dict[str, tuple[str, ...]] = {}
        for provider in benchmark.providers:
            complaints = tuple(provider.judge())
            if complaints:
                wrong[provider.name] = complaints
        runs = {p.name: p.run for p in benchmark.providers if p.name not in wrong}
        wait = torch.cuda.synchronize if benchmark.device == "cuda" else None
        samples: dict[str, list[float]] = {}
        if runs:
            samples = interleaved(runs, seconds=seconds, min_rounds=min_rounds, max_rounds=max_rounds, wait=wait)
        peaks = {name: peak_memory_mib(run, benchmark.device) for name, run in runs.items()} if memory else {}
    return Outcome(benchmark=benchmark, samples=samples, wrong=wrong, memory_mib=peaks)


def report(outcome: Outcome) -> list[str]:
    """Readable lines: times, then the providers that were refused and the reasons."""
    benchmark = outcome.benchmark
    head = f"{benchmark.case}  {dtype_name(benchmark.dtype)}  {benchmark.direction}  {benchmark.threads} thread(s)"
    lines = [head]
    for provider, samples in outcome.samples.items():
        p20, p50, p80 = percentiles_ms(samples)
        memory = outcome.memory_mib.get(provider)
        size = "" if memory is None else f"  {memory:9.2f} MiB"
        lines.append(f"  {provider:24s} {p50:10.3f} ms  ({p20:.3f} to {p80:.3f}, {len(samples)} rounds){size}")
    for provider, complaints in outcome.wrong.items():
        lines.append(f"  {provider:24s} WRONG, not timed: {complaints[0]}")
    return lines + [f"  {refusal}" for refusal in benchmark.refusals]
