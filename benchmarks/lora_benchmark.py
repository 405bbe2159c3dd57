# SPDX-License-Identifier: Apache-2.0
"""A multi-LoRA case as a benchmark: its providers, what is timed, and how each provider is checked.

The check covers the LoRA delta alone (the checked copy has a base weight of zero) without dropout, since masks differ
between providers. Output, dx, dA and dB: the worst row against float64 has at most `factor` times the error of the
reference. This package's providers must meet the rule of the kernels' tests (2); a baseline may be less accurate (8;
a missing expert gives hundreds).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.benchmark import Benchmark, CannotTake, Provider
from benchmarks.lora_case import Direction, LoraCase, LoraProblem, make_problem
from benchmarks.lora_providers import Built, backends, builders
from dmole_kernels.testing import Results, expected_errors, judge, multi_lora_loop, rejected, run_autograd

JUDGED_FLOPS = 1e10  # of the float64 oracle, which runs every expert on every row
OWN_FACTOR, BASELINE_FACTOR = 2.0, 8.0


def lora_benchmark(
    case: LoraCase, dtype: torch.dtype, direction: Direction, threads: int, providers: Sequence[str],
    *, table: Mapping[str, Callable[[LoraProblem], Built]] | None = None, device: str = "cpu",
) -> Benchmark:  # fmt: skip
    """`table` adds or replaces providers (tests pass a wrong one)."""
    known = {**builders(device), **(table or {})}
    if "packed_compiled" in providers:
        torch._dynamo.reset()  # earlier cases' code, which counts against the limit of recompilations
    problem = make_problem(case, dtype, device=device)
    judging = _Judging(case, dtype, direction, device)
    made: list[Provider] = []
    refusals: list[str] = []
    for name in providers:
        try:
            built = known[name](problem)
            if direction == "forward_backward" and not built.trains:
                raise CannotTake("it supports inference only")
            judged = known[name](judging.problem) if name != "base_only" else built
        except CannotTake as reason:
            refusals.append(f"{name}: not in this case: {reason}")
            continue
        flops = problem.base_flops(direction)
        if name == "base_only":
            judge_it: Callable[[], Sequence[str]] = _base_judge(built, problem)
        else:
            flops += problem.added_flops(direction)
            factor = OWN_FACTOR if name.startswith(backends(device)) else BASELINE_FACTOR
            judge_it = _expert_judge(judging, judged, factor)
        made.append(Provider(name=name, run=call(built, problem, direction), judge=judge_it, flops=flops))
    return Benchmark(
        case=case.name,
        dtype=dtype,
        direction=direction,
        threads=threads,
        providers=made,
        base="base_only",
        added_flops=problem.added_flops(direction),
        added_bytes=problem.added_bytes(direction),
        base_bytes=problem.base_bytes(direction),
        device=device,
        refusals=refusals,
    )


def call(built: Built, problem: LoraProblem, direction: Direction) -> Callable[[], object]:
    """What is timed: the output alone, or the output and fresh gradients for x and every trainable expert."""
    x = problem.inputs.x.detach()
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return built.forward(x)

        return forward
    x = x.requires_grad_()

    def forward_backward() -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(built.forward(x), [x, *built.parameters], problem.inputs.grad, allow_unused=True)

    return forward_backward


def results_of(built: Built, problem: LoraProblem, direction: Direction) -> Results:
    """delta, dx and the trainable experts' da and db; zeros for what autograd found unused."""
    x = problem.inputs.x.detach().requires_grad_(direction == "forward_backward")
    with torch.set_grad_enabled(direction == "forward_backward"):
        y = built.forward(x)
    if direction == "forward":
        return {"delta": y}
    leaves = [x, *built.parameters]
    grads = torch.autograd.grad(y, leaves, problem.inputs.grad, allow_unused=True)
    full = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]
    inputs = problem.inputs
    results = {"delta": y.detach(), "dx": full[0]}
    named = built.gradients(full[1:])
    for e, flag in enumerate(inputs.trainable):
        if flag:
            # A baseline that packs only the experts in use leaves the others out: their gradient is zero.
            results[f"da_{e}"] = named.get(f"da_{e}", torch.zeros_like(inputs.lora_a[e]))
            results[f"db_{e}"] = named.get(f"db_{e}", torch.zeros_like(inputs.lora_b[e]))
    return results


@dataclass(frozen=True)
class _Judging:
    """The checked copy of a case: few enough rows for float64, W = 0, no dropout."""

    case: LoraCase
    dtype: torch.dtype
    direction: Direction
    device: str

    @property
    def problem(self) -> LoraProblem:
        return _judged_problem(self.case, self.dtype, self.device)

    def truth_and_expected(self) -> tuple[Results, dict[str, float]]:
        truth, expected = _oracle(self.case, self.dtype, self.device)
        return ({"delta": truth["delta"]} if self.direction == "forward" else truth), expected


@cache
def _judged_problem(case: LoraCase, dtype: torch.dtype, device: str) -> LoraProblem:
    per_row = 6.0 * (case.in_features + case.out_features) * sum(case.ranks)
    # With one row the comparison of two rounding errors is up to chance.
    rows = replace(case, samples=max(case.samples, -(-16 // case.tokens)))
    small = replace(rows.limited(max(1, min(1024, int(JUDGED_FLOPS / per_row)))), dropout=0.0)
    return make_problem(small, dtype, seed=1, zero_base=True, device=device)


@cache
def _oracle(case: LoraCase, dtype: torch.dtype, device: str) -> tuple[Results, dict[str, float]]:
    inputs = _judged_problem(case, dtype, device).inputs
    truth = run_autograd(multi_lora_loop, inputs.to(torch.float64))
    return {name: tensor for name, tensor in truth.items() if name != "dgate"}, expected_errors(inputs)


def _expert_judge(judging: _Judging, built: Built, factor: float) -> Callable[[], Sequence[str]]:
    def complaints() -> Sequence[str]:
        truth, expected = judging.truth_and_expected()
        actual = results_of(built, judging.problem, judging.direction)
        return rejected(judge(actual, expected, truth, factor=factor))

    return complaints


def _base_judge(built: Built, problem: LoraProblem) -> Callable[[], Sequence[str]]:
    def complaints() -> Sequence[str]:
        x = problem.inputs.x.reshape(-1, problem.case.in_features)[:16]
        truth = F.linear(x.double(), problem.weight.double())
        error = float((built.forward(x).double() - truth).norm() / truth.norm())
        allowed = 16 * torch.finfo(x.dtype).eps
        return [] if error <= allowed else [f"base: relative error {error:.3g} above {allowed:.3g}"]

    return complaints
