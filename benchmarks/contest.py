# SPDX-License-Identifier: Apache-2.0
"""One case, its contenders, and the order of things: judged against float64 first, then timed interleaved, then a row.

A contender whose results are wrong gets no row; neither does one that cannot take the case. Both are said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.machine import Machine, dtype_name
from benchmarks.memory import peak_memory_mib
from benchmarks.records import Row
from benchmarks.timing import interleaved, paired_ratio, percentiles_ms
from dmole_kernels.testing import threads as with_threads


class CannotTake(Exception):
    """A rival that cannot do this case; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """`run` is what is timed; `judge` says what is wrong with its results, line by line (nothing: it is right).

    `flops` is what the case needs of it, not what it spends.
    """

    provider: str
    run: Callable[[], object]
    judge: Callable[[], Sequence[str]]
    flops: float


@dataclass(frozen=True, kw_only=True)
class Contest:
    """`base` is the provider whose time the others' overhead is counted from; None counts from zero."""

    case: str
    dtype: torch.dtype
    direction: str
    threads: int
    contenders: Sequence[Contender]
    base: str | None = None
    added_flops: float = 0.0
    added_bytes: float = 0.0
    base_bytes: float = 0.0
    device: str = "cpu"
    refusals: Sequence[str] = ()


@dataclass
class Outcome:
    """`samples[provider]` in seconds per call, equally many for each; `wrong` providers have none."""

    contest: Contest
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
        contest = self.contest
        peak = machine.peak(contest.dtype, contest.threads)
        floor = max(contest.added_flops / peak, contest.added_bytes / machine.bandwidth(contest.threads))
        base_ms = self.p50_ms(contest.base) if contest.base in self.samples else None
        rows = []
        for contender in contest.contenders:
            provider = contender.provider
            if provider not in self.samples:
                continue
            times = percentiles_ms(self.samples[provider])
            overhead: float | str = ""
            if provider != contest.base and floor > 0 and (contest.base is None or base_ms is not None):
                overhead = (times[1] - (base_ms or 0.0)) / 1e3 / floor
            rows.append(
                machine.row(
                    case=contest.case,
                    dtype=dtype_name(contest.dtype),
                    direction=contest.direction,
                    threads=contest.threads,
                    provider=provider,
                    times_ms=times,
                    peak_memory_mib=self.memory_mib.get(provider, ""),
                    peak_fraction=contender.flops / (times[1] / 1e3) / peak if contender.flops else "",
                    overhead_over_floor=overhead,
                )
            )
        return rows


def hold(
    contest: Contest, *, seconds: float, min_rounds: int = 5, max_rounds: int = 100, memory: bool = True
) -> Outcome:
    """Judges every contender, then times those that are right."""
    with with_threads(contest.threads):
        wrong: dict[str, tuple[str, ...]] = {}
        for contender in contest.contenders:
            complaints = tuple(contender.judge())
            if complaints:
                wrong[contender.provider] = complaints
        runs = {c.provider: c.run for c in contest.contenders if c.provider not in wrong}
        wait = torch.cuda.synchronize if contest.device == "cuda" else None
        samples: dict[str, list[float]] = {}
        if runs:
            samples = interleaved(runs, seconds=seconds, min_rounds=min_rounds, max_rounds=max_rounds, wait=wait)
        peaks = {provider: peak_memory_mib(run, contest.device) for provider, run in runs.items()} if memory else {}
    return Outcome(contest=contest, samples=samples, wrong=wrong, memory_mib=peaks)


def report(outcome: Outcome) -> list[str]:
    """Readable lines: times, then who was refused and why."""
    contest = outcome.contest
    head = f"{contest.case}  {dtype_name(contest.dtype)}  {contest.direction}  {contest.threads} thread(s)"
    lines = [head]
    for provider, samples in outcome.samples.items():
        p20, p50, p80 = percentiles_ms(samples)
        memory = outcome.memory_mib.get(provider)
        size = "" if memory is None else f"  {memory:9.2f} MiB"
        lines.append(f"  {provider:24s} {p50:10.3f} ms  ({p20:.3f} to {p80:.3f}, {len(samples)} rounds){size}")
    for provider, complaints in outcome.wrong.items():
        lines.append(f"  {provider:24s} WRONG, not timed: {complaints[0]}")
    return lines + [f"  {refusal}" for refusal in contest.refusals]
