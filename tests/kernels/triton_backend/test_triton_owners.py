# SPDX-License-Identifier: Apache-2.0
"""Whose addresses a launch reads: experts that need a cast or a copy are alive until the launch has run."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dmole_kernels._lora_call import LoraCall
from dmole_kernels.testing import (
    LoraInputs,
    Workload,
    make_inputs,
    multi_lora_loop,
    poisoned_memory,
    run_autograd,
    run_kernels,
)
from dmole_kernels.triton_backend import columns
from dmole_kernels.triton_backend.fused_base import fused_base_forward
from dmole_kernels.triton_backend.launch import Launch
from dmole_kernels.triton_backend.multi_lora import multi_lora_backward, multi_lora_forward

LAYER = Workload(name="layer", leading=(3, 13), in_features=37, out_features=53, ranks=(3, 5, 17), frozen=(1,))
EXACT = {torch.float32: 1e-4, torch.bfloat16: 0.1}


def several_dtypes(inputs: LoraInputs) -> LoraInputs:
    """Rounded to bfloat16 all, so that every cast is exact; the first in x's dtype, which needs none."""
    dtypes = (inputs.x.dtype, torch.bfloat16, torch.float64)
    coarse = inputs.to(torch.bfloat16)
    return replace(
        coarse.to(inputs.x.dtype),
        lora_a=tuple(a.to(dtype) for a, dtype in zip(coarse.lora_a, dtypes, strict=True)),
        lora_b=tuple(b.to(dtype) for b, dtype in zip(coarse.lora_b, dtypes[::-1], strict=True)),
    )


def transposed_b(inputs: LoraInputs) -> LoraInputs:
    return replace(inputs, lora_b=tuple(b.t().contiguous().t() for b in inputs.lora_b))


def strided_a(inputs: LoraInputs) -> LoraInputs:
    return replace(inputs, lora_a=tuple(a.repeat_interleave(2, 1)[:, ::2] for a in inputs.lora_a))


def some_strided(inputs: LoraInputs) -> LoraInputs:
    """Only the last expert needs a copy."""
    changed = strided_a(transposed_b(inputs))
    return replace(
        inputs, lora_a=(*inputs.lora_a[:2], changed.lora_a[2]), lora_b=(*inputs.lora_b[:2], changed.lora_b[2])
    )


STORED: dict[str, Callable[[LoraInputs], LoraInputs]] = {
    "several dtypes": several_dtypes,
    "B transposed": transposed_b,
    "A strided": strided_a,
    "some strided": some_strided,
    "several dtypes, B transposed": lambda inputs: transposed_b(several_dtypes(inputs)),
}


def switches(inputs: LoraInputs) -> tuple[object, ...]:
    return inputs.lora_a, inputs.lora_b, inputs.gate, inputs.scale, 0.0, False, None


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("stored", STORED)
def test_forward_and_backward_equal_the_definition(stored: str, dtype: torch.dtype) -> None:
    inputs = STORED[stored](make_inputs(LAYER, dtype))
    truth = run_autograd(multi_lora_loop, inputs.to(torch.float64))
    with poisoned_memory():
        actual = run_kernels(multi_lora_forward, multi_lora_backward, inputs)
    for name, exact in truth.items():
        difference = (actual[name].double() - exact).abs().max()
        assert difference <= EXACT[dtype] * exact.abs().max(), name


@pytest.mark.parametrize("stored", STORED)
def test_the_fused_forward_equals_the_definition(stored: str) -> None:
    inputs = STORED[stored](make_inputs(LAYER))
    weight = torch.randn(53, 37, generator=torch.Generator().manual_seed(1))
    exact = multi_lora_loop(inputs.to(torch.float64)) + inputs.x.double() @ weight.double().t()
    with poisoned_memory():
        y, _ = fused_base_forward(LoraCall(inputs.x, None, *switches(inputs)), weight, None)  # type: ignore[arg-type]
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stored", STORED)
def test_launches_run_later_hold_the_experts_themselves(stored: str) -> None:
    """Everything a caller gave is gone when the launches run."""
    found: list[Launch] = []

    def collected() -> tuple[Tensor, Tensor]:
        inputs = STORED[stored](make_inputs(LAYER))
        y, _ = multi_lora_forward(LoraCall(inputs.x, None, *switches(inputs)), runner=found.append)  # type: ignore[arg-type]
        return y, multi_lora_loop(inputs.to(torch.float64))

    y, exact = collected()
    gc.collect()
    _others = [torch.full((size,), torch.nan) for size in range(1, 2000, 7)]  # takes the memory that was given back
    for launch in found:
        launch.run()
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stored", ["several dtypes", "A strided", "some strided"])
def test_no_table_of_a_copy_is_kept(stored: str) -> None:
    inputs = STORED[stored](make_inputs(LAYER))
    kept = len(columns._tables)
    multi_lora_forward(LoraCall(inputs.x, None, *switches(inputs)))  # type: ignore[arg-type]
    assert len(columns._tables) == kept


@pytest.mark.parametrize("change", [lambda inputs: inputs, transposed_b], ids=["as they are", "B transposed"])
def test_experts_that_need_no_copy_share_one_kept_table(change: Callable[[LoraInputs], LoraInputs]) -> None:
    inputs = change(make_inputs(LAYER))
    kept = len(columns._tables)
    for _ in range(3):
        multi_lora_forward(LoraCall(inputs.x, None, *switches(inputs)))  # type: ignore[arg-type]
    assert len(columns._tables) <= kept + 1
