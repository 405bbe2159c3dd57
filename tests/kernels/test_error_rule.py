# SPDX-License-Identifier: Apache-2.0
"""The rule that judges kernels, examined itself."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dmole_kernels.testing import (
    WORKLOADS,
    expected_errors,
    judge,
    judge_run,
    make_inputs,
    multi_lora_loop,
    product_error,
    rejected,
    run_autograd,
    run_reference,
    threads,
    worst_row_error,
)


def test_the_worst_row_decides_and_twice_the_expected_error_is_allowed() -> None:
    truth = {"y": torch.ones(3, 4, dtype=torch.float64)}
    off = torch.tensor([0.0, 1e-3, 0.0])[:, None]
    assert worst_row_error(torch.ones(3, 4) + off, truth["y"]) == pytest.approx(1e-3, rel=1e-3)
    assert not rejected(judge({"y": torch.ones(3, 4) + 1.9 * off}, {"y": 1e-3}, truth))
    (line,) = rejected(judge({"y": torch.ones(3, 4) + 2.1 * off}, {"y": 1e-3}, truth))
    assert line.startswith("y: worst-row error 0.0021 above 0.002 (expected 0.001)")


def test_a_nan_is_never_accepted() -> None:
    truth = {"y": torch.ones(2, 2).double()}
    assert rejected(judge({"y": torch.tensor([[1.0, 1.0], [1.0, float("nan")]])}, {"y": 1.0}, truth))


def test_the_expected_error_of_a_product_by_hand() -> None:
    """[1, 2] @ [3, 4]^T = 11 in float32: two terms with squares 9 and 64, one rounding of 11; u = 2^-24."""
    u = 2.0**-24
    by_hand = math.sqrt(2 * u**2 * (9 + 64) + u**2 * 121)
    found = product_error(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.float32)
    assert found == pytest.approx(by_hand, rel=1e-12)
    # bfloat16 sums in float32: the one rounding of the store is all that counts.
    stored = product_error(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.bfloat16)
    assert stored == pytest.approx(2.0**-8 * 11, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_analysis_is_tight_for_the_reference(dtype: torch.dtype) -> None:
    """Real errors are within a factor of 30 of the expected ones, so that no fault can hide in a loose bound; the
    expected ones are a function of the inputs alone."""
    for workload in WORKLOADS:
        if 0 in workload.leading:
            continue
        for verdict in judge_run(run_reference, workload, dtype, draws=8):
            assert verdict.error <= verdict.allowed
            assert verdict.error >= verdict.expected / 30
        inputs = make_inputs(workload, dtype)
        with threads(2):
            assert expected_errors(inputs) == expected_errors(make_inputs(workload, dtype))


def test_errors_tell_what_to_do() -> None:
    y = {"y": torch.ones(2, 2)}
    with pytest.raises(
        ValueError, match=r"results have shapes {'y': \(2,\)}; expected {'y': \(2, 2\)}. Return what the"
    ):
        judge({"y": torch.ones(2)}, {"y": 1.0}, y)
    inputs = make_inputs(WORKLOADS[0])
    with pytest.raises(ValueError, match="no gradient for dgate; expected one for each differentiable input"):
        run_autograd(lambda i: multi_lora_loop(replace(i, gate=i.gate.detach())), inputs)
