# SPDX-License-Identifier: Apache-2.0
"""The fields of `LoraCall` that no layer fills in yet: packed experts, and several linears with one x."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dmole_kernels import reference
from dmole_kernels._lora_call import LoraCall
from dmole_kernels._multi_lora import run, run_eager

FEATURES, RANKS, OUTPUTS = 6, (2, 3), (5, 2, 4)  # q, k and v
STARTS = [0, 0, 5, 5, 7, 7]  # pairs: q's part of both experts, then k's, then v's
SCALE = [2.0, 0.5]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def parts() -> tuple[Tensor, Tensor, Tensor, list[list[Tensor]], list[list[Tensor]]]:
    """x, the bases side by side, a gate with a zero, and [linear][expert] A and B."""
    torch.manual_seed(0)
    gate = torch.tensor([[1.0, -0.5], [0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    a = [[draw(rank, FEATURES) for rank in RANKS] for _ in OUTPUTS]
    b = [[draw(outputs, rank) for rank in RANKS] for outputs in OUTPUTS]
    return draw(2, 3, FEATURES), draw(2, 3, sum(OUTPUTS)), gate, a, b


def group(x: Tensor, base: Tensor | None, gate: Tensor, a: list[list[Tensor]], b: list[list[Tensor]]) -> LoraCall:
    return LoraCall(x, base, sum(a, []), sum(b, []), gate.repeat(1, len(OUTPUTS)), SCALE * len(OUTPUTS), starts=STARTS)


@pytest.mark.parametrize("with_base", [True, False])
def test_a_group_of_linears_equals_one_call_each(with_base: bool) -> None:
    x, base, gate, a, b = parts()
    bases = base.split(OUTPUTS, -1) if with_base else [None] * len(OUTPUTS)
    alone = [run_eager(LoraCall(x, *each, gate, SCALE), "reference") for each in zip(bases, a, b, strict=True)]
    expected = torch.cat(alone, -1)
    found = run_eager(group(x, base if with_base else None, gate, a, b), "reference")
    torch.testing.assert_close(found, expected)
    leaves = [x, gate, *sum(a, []), *sum(b, []), *([base] if with_base else [])]
    upstream = torch.randn_like(expected)
    for one, two in zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_backends_without_a_kernel_for_a_group_refuse_it(backend: str) -> None:
    x, base, gate, a, b = parts()
    with pytest.raises(NotImplementedError, match=rf"backend '{backend}' has no kernel for a group of linears; expect"):
        run(group(x, base, gate, a, b), backend)


def test_a_traced_group_is_refused() -> None:
    x, base, gate, a, b = parts()
    with pytest.raises(Exception, match="the registered op takes no group of linears; expected starts=None"):
        torch.compile(lambda: run(group(x, base, gate, a, b), "reference"), backend="eager", fullgraph=True)()


def test_packed_experts_are_read_in_place_of_the_lists() -> None:
    x, base, gate, a, b = parts()
    plain = LoraCall(x, base[..., :5], a[0], b[0], gate, SCALE)
    expected, s_NR = reference.multi_lora_forward(plain)
    packed = reference.pack_experts(a[0], b[0], torch.float64)
    nothing = (
        [torch.full_like(tensor, torch.nan) for tensor in a[0]],
        [torch.full_like(tensor, torch.nan) for tensor in b[0]],
    )
    call = LoraCall(x, base[..., :5], *nothing, gate, SCALE, packed=packed)
    found, s_packed_NR = reference.multi_lora_forward(call)
    assert torch.equal(found, expected) and torch.equal(s_packed_NR, s_NR)
