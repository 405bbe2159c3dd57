# SPDX-License-Identifier: Apache-2.0
"""
    accepted  <=>  worst_row(kernel - truth) <= 2 expected        worst_row(e) = max_n rms(e[n, :])

Truth is the oracle in float64 on the same (already rounded) inputs. `expected` is the error that rounding analysis
gives for these inputs (`_rounding`): the same number on every machine, independent of its BLAS. The rule applies to
every output and gradient, and to the LoRA delta ALONE: added to the base layer's output, a missing expert can be
smaller than bfloat16 rounding (of 15 broken kernels the same rule on base + delta caught 8 to 12).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmole_kernels._rounding import multi_lora_errors
from dmole_kernels.testing.oracle import Results, multi_lora_loop, run_autograd
from dmole_kernels.testing.workloads import LoraInputs, Workload, make_inputs

# A kernel's worst of many rows against the expected error of the worst one.
FACTOR = 2.0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One tensor's errors: accepted when `error <= allowed`; a NaN anywhere is not."""

    name: str
    error: float
    expected: float
    allowed: float

    @property
    def accepted(self) -> bool:
        return self.error <= self.allowed


def worst_row_error(actual: Tensor, truth: Tensor) -> float:
    """The largest root mean square error of a row (the last dimension); 0.0 without rows."""
    if truth.numel() == 0:
        return 0.0
    difference = actual.double().reshape(-1, actual.shape[-1]) - truth.double().reshape(-1, truth.shape[-1])
    return float(difference.square().mean(1).sqrt().max())


def judge(actual: Results, expected: Mapping[str, float], truth: Results, *, factor: float = FACTOR) -> list[Verdict]:
    """One verdict a tensor: at most `factor` times its expected error, the worst row of each.

    Raises ValueError when tensors are missing or have other shapes than the truth's.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in truth.items()}
    got = {name: tuple(tensor.shape) for name, tensor in actual.items()}
    if got != shapes:
        raise ValueError(f"results have shapes {got}; expected {shapes}. Return what the oracle returns.")
    return [
        Verdict(
            name=name,
            error=worst_row_error(actual[name], exact),
            expected=expected[name],
            allowed=factor * expected[name],
        )
        for name, exact in truth.items()
    ]


def expected_errors(inputs: LoraInputs) -> dict[str, float]:
    """The expected error of a correct kernel on these inputs in their dtype, by result."""
    return multi_lora_errors(inputs.call(), inputs.grad, inputs.trainable, inputs.x.dtype)


def few_roundings(dtype: torch.dtype, truth: Tensor, *, roundings: int = 4) -> float:
    """An expected error for results that are exact but for their last roundings: `roundings` units of the largest
    row, for ops that accumulate in a wider type or add few terms."""
    return roundings * torch.finfo(dtype).eps / 2 * worst_row_error(torch.zeros_like(truth), truth)


def judge_run(
    run: Callable[[LoraInputs], Results], workload: Workload, dtype: torch.dtype, *, factor: float = FACTOR,
    draws: int = 4,
) -> list[Verdict]:  # fmt: skip
    """The rule on all outputs of `run` for a workload, several draws together: the worst row of all."""
    actuals: list[Results] = []
    truths: list[Results] = []
    expected: dict[str, float] = {}
    for seed in range(draws):
        inputs = make_inputs(workload, dtype, seed)
        actuals.append(run(inputs))
        truths.append(run_autograd(multi_lora_loop, inputs.to(torch.float64)))
        for name, error in expected_errors(inputs).items():
            expected[name] = max(error, expected.get(name, 0.0))
    actual, truth = (
        {name: torch.stack([r[name] for r in results]) for name in results[0]} for results in (actuals, truths)
    )
    return judge(actual, expected, truth, factor=factor)


def rejected(verdicts: Sequence[Verdict]) -> list[str]:
    """Readable lines of the results that failed; empty when all were accepted."""
    return [
        f"{v.name}: worst-row error {v.error:.3g} above {v.allowed:.3g} (expected {v.expected:.3g})"
        for v in verdicts
        if not v.accepted
    ]
