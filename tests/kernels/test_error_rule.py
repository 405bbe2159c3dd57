# SPDX-License-Identifier: Apache-2.0
"""The rule that judges kernels, examined itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dmole_kernels.testing import (
    WORKLOADS,
    judge,
    make_inputs,
    multi_lora_loop,
    rejected,
    run_autograd,
    worst_row_error,
)


def test_the_worst_row_decides_and_twice_the_yardstick_s_error_is_allowed() -> None:
    truth = {"y": torch.ones(3, 4, dtype=torch.float64)}
    off = torch.tensor([0.0, 1e-3, 0.0])[:, None]
    yardstick = {"y": torch.ones(3, 4) + off}
    assert worst_row_error(yardstick["y"], truth["y"]) == pytest.approx(1e-3, rel=1e-3)
    assert not rejected(judge({"y": torch.ones(3, 4) + 1.9 * off}, yardstick, truth))
    (line,) = rejected(judge({"y": torch.ones(3, 4) + 2.1 * off}, yardstick, truth))
    assert line.startswith("y: worst-row error 0.0021 above 0.002 (yardstick 0.001)")


def test_a_nan_is_never_accepted() -> None:
    truth, yardstick = {"y": torch.ones(2, 2).double()}, {"y": 2 * torch.ones(2, 2)}
    assert rejected(judge({"y": torch.tensor([[1.0, 1.0], [1.0, float("nan")]])}, yardstick, truth))


def test_an_exact_yardstick_leaves_half_an_epsilon() -> None:
    truth = {"y": torch.ones(1, 1).double()}
    assert not rejected(judge({"y": torch.tensor([[1.0 + 2**-24]]).double()}, {"y": torch.ones(1, 1)}, truth))
    assert rejected(judge({"y": torch.tensor([[1.0 + 2**-22]])}, {"y": torch.ones(1, 1)}, truth))


def test_errors_tell_what_to_do() -> None:
    y = {"y": torch.ones(2, 2)}
    with pytest.raises(
        ValueError, match=r"results have shapes {'y': \(2,\)}; expected {'y': \(2, 2\)}. Return what the"
    ):
        judge({"y": torch.ones(2)}, y, y)
    inputs = make_inputs(WORKLOADS[0])
    with pytest.raises(ValueError, match="no gradient for dgate; expected one for each differentiable input"):
        run_autograd(lambda i: multi_lora_loop(replace(i, gate=i.gate.detach())), inputs)
