# SPDX-License-Identifier: Apache-2.0
"""A gate of zero means zero in the decode kernels, whatever the row or the expert holds, and gates are multiplied in
float32. Truth is a loop over rows and experts in float64 that leaves unused pairs out.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dmole_kernels import cuda
from dmole_kernels._lora_call import LoraCall

pytestmark = pytest.mark.usefixtures("host")

INFINITY, NAN = float("inf"), float("nan")
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"]
)
SCALE = [2.0, 0.75, -0.5]


def drawn(dtype: torch.dtype, ranks: tuple[int, ...] = (3, 16, 5)) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """x, A, B and gates: neighbouring rows use different experts, row 0 the first one alone, row 1 none."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    used = torch.rand(14, len(ranks), generator=generator) < 0.5
    used[0] = torch.tensor([True] + [False] * (len(ranks) - 1))
    used[1] = False
    gate = (torch.rand(14, len(ranks), generator=generator) + 0.5) * used
    return draw(14, 70), [draw(rank, 70) / 8 for rank in ranks], [draw(45, rank) for rank in ranks], gate


def decode(x: Tensor, a: list[Tensor], b: list[Tensor], gate: Tensor, scale: list[float]) -> tuple[Tensor, Tensor]:
    return cuda.multi_lora_forward(LoraCall(x, None, a, b, gate, scale, 0.0, False, None))


def truth(x: Tensor, a: list[Tensor], b: list[Tensor], gate: Tensor, scale: list[float]) -> Tensor:
    y = torch.zeros(x.shape[0], b[0].shape[0], dtype=torch.float64)
    for n, e in (gate != 0).nonzero().tolist():
        y[n] += gate[n, e].double() * scale[e] * (b[e].double() @ (a[e].double() @ x[n].double()))
    return y


def check_near(actual: Tensor, exact: Tensor) -> None:
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=16 * eps * float(exact.abs().max()))


@DTYPES
@pytest.mark.parametrize("value", [INFINITY, NAN])
@pytest.mark.parametrize("where", ["a", "b"])
def test_an_expert_of_inf_or_nan_changes_no_bit_where_it_is_not_used(
    dtype: torch.dtype, where: str, value: float
) -> None:
    x, a, b, gate = drawn(dtype)
    (y, s), unused = decode(x, a, b, gate, SCALE), gate[:, 1] == 0
    check_near(y, truth(x, a, b, gate, SCALE))
    broken = {"a": a, "b": b}[where]
    broken[1] = torch.full_like(broken[1], value)
    actual, actual_s = decode(x, a, b, gate, SCALE)
    assert torch.equal(actual[unused], y[unused])
    assert torch.equal(actual_s[unused], s[unused])
    assert not actual[~unused].isfinite().all(1).any()


@DTYPES
@pytest.mark.parametrize("value", [INFINITY, NAN])
def test_a_row_of_inf_or_nan_stays_alone_and_is_zero_where_it_uses_no_expert(dtype: torch.dtype, value: float) -> None:
    x, a, b, gate = drawn(dtype)
    y, _ = decode(x, a, b, gate, SCALE)
    x[[1, 4]] = value
    actual, s_NR = decode(x, a, b, gate, SCALE)
    others = [n for n in range(14) if n not in (1, 4)]
    assert torch.equal(actual[others], y[others])
    assert not actual[1].any() and not s_NR[1].any()


@pytest.mark.parametrize("gate_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_gate_and_scale_are_multiplied_in_float32(gate_dtype: torch.dtype) -> None:
    """A scale that no narrow dtype holds: 1e5 is beyond float16, and 1.0009765625 is 1 in bfloat16."""
    x, a, b, gate = drawn(torch.float32)
    gate = (gate != 0).to(gate_dtype) * 0.8125
    for expert in range(3):
        scale = [1e5, 1.0009765625, -3e4]
        only = gate * torch.eye(3, dtype=gate_dtype)[expert]
        check_near(decode(x, a, b, only, scale)[0], truth(x, a, b, only, scale))


@DTYPES
@pytest.mark.parametrize("ranks", [(0, 0, 3), (0,), (5, 0, 2)], ids=str)
def test_experts_of_rank_0_add_nothing(dtype: torch.dtype, ranks: tuple[int, ...]) -> None:
    x, a, b, gate = drawn(dtype, ranks)
    scale = SCALE[: len(ranks)]
    check_near(decode(x, a, b, gate, scale)[0], truth(x, a, b, gate, scale))


def test_a_scale_of_zero_is_an_ordinary_number() -> None:
    x, a, b, gate = drawn(torch.float32)
    b[1].fill_(INFINITY)
    y, _ = decode(x, a, b, gate, [2.0, 0.0, -0.5])
    assert torch.equal(y.isnan().any(1), gate[:, 1] != 0)
