# SPDX-License-Identifier: Apache-2.0
"""
A gate of zero means zero: an inf or NaN of an expert, of x or of dY reaches only the pairs of a row and an expert whose
gate is not zero. Also gates of another dtype than the call's, and experts of rank 0.

The truth is float64 and sums over the rows that use an expert only, so it multiplies nothing by a gate of zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from dmole_kernels._lora_call import LoraCall
from dmole_kernels._philox import dropout_keep_mask
from dmole_kernels.testing import (
    LoraInputs,
    Results,
    Workload,
    make_inputs,
    multi_lora_loop,
    multi_lora_op,
    poisoned_memory,
    run_autograd,
    run_kernels,
)
from dmole_kernels.triton_backend.fused_base import fused_base_forward
from dmole_kernels.triton_backend.multi_lora import multi_lora_backward, multi_lora_forward

pytestmark = pytest.mark.usefixtures("triton_on_cpu", "numpy_stays_silent")

# Sample 0 uses experts 0 and 2, sample 1 none, sample 2 expert 1 alone; all in one tile of rows.
GATE = torch.tensor([[1.0, 0.0, -0.5], [0.0, -0.0, 0.0], [0.0, 2.0, 0.0]])
SMALL = Workload(name="one_block", leading=(3, 5), in_features=20, out_features=18, ranks=(3, 5, 2))
LAYERS = {
    layer.name: layer
    for layer in (
        SMALL,
        replace(SMALL, name="two_blocks", leading=(3, 3), ranks=(3, 60, 7)),
        replace(SMALL, name="token_gates", gate="token"),
        replace(SMALL, name="dropout", dropout=0.3),
        replace(SMALL, name="dropout_per_expert", dropout=0.3, per_expert=True),
        replace(SMALL, name="frozen", frozen=(0,)),
        replace(SMALL, name="several_splits", leading=(3, 30), ranks=(1, 1, 1)),
        replace(SMALL, name="several_tiles", in_features=130, out_features=40),
    )
}
INF, NAN = float("inf"), float("nan")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def definition(inputs: LoraInputs) -> Tensor:
    rows = inputs.x.shape[:-1].numel()
    x_ND = inputs.x.reshape(rows, -1)
    gate_GE = inputs.gate.reshape(-1, len(inputs.scale))
    gate_NE = gate_GE.repeat_interleave(rows // gate_GE.shape[0], 0)
    delta = x_ND.new_zeros(rows, inputs.lora_b[0].shape[0])
    for e, (a, b, scale) in enumerate(zip(inputs.lora_a, inputs.lora_b, inputs.scale, strict=True)):
        dropped = x_ND
        if inputs.dropout:
            stream = e if inputs.per_expert else 0
            keep = dropout_keep_mask(int(inputs.seed), rows, x_ND.shape[1], inputs.dropout, stream=stream)
            dropped = torch.where(keep, x_ND, 0.0) / (1.0 - inputs.dropout)
        used = (gate_NE[:, e] != 0).nonzero().flatten()
        delta = delta.index_add(0, used, gate_NE[used, e, None] * scale * (dropped[used] @ a.t() @ b.t()))
    return delta.view(*inputs.x.shape[:-1], -1)


def changed(tensors: tuple[Tensor, ...], e: int, *places: tuple[object, float]) -> tuple[Tensor, ...]:
    copies = [tensor.clone() for tensor in tensors]
    for place, value in places:
        copies[e][place] = value  # type: ignore[index]
    return tuple(copies)


def with_row(tensor: Tensor, sample: int, value: float) -> Tensor:
    (copy,) = changed((tensor,), 0, ((sample, 1), value))
    return copy


POISON: dict[str, Callable[[LoraInputs], LoraInputs]] = {
    "A_inf": lambda i: replace(i, lora_a=changed(i.lora_a, 1, ((0, 4), INF), ((2, 7), -INF))),
    "A_nan": lambda i: replace(i, lora_a=changed(i.lora_a, 1, (slice(None), NAN))),
    "B_inf": lambda i: replace(i, lora_b=changed(i.lora_b, 1, ((3, 2), INF), ((9, 0), -INF))),
    "B_nan": lambda i: replace(i, lora_b=changed(i.lora_b, 1, ((slice(None), 1), NAN))),
    "x_nan_without_expert": lambda i: replace(i, x=with_row(i.x, 1, NAN)),
    "x_inf_with_expert_1": lambda i: replace(i, x=with_row(i.x, 2, INF)),
    "dy_nan_without_expert": lambda i: replace(i, grad=with_row(i.grad, 1, NAN)),
    "dy_inf_with_expert_1": lambda i: replace(i, grad=with_row(i.grad, 2, -INF)),
    "all": lambda i: POISON["A_nan"](
        POISON["B_inf"](POISON["x_nan_without_expert"](POISON["dy_inf_with_expert_1"](i)))
    ),
}


def drawn(layer: str, dtype: torch.dtype = torch.float32) -> LoraInputs:
    workload = LAYERS[layer]
    gate = GATE if workload.gate == "sample" else GATE.repeat_interleave(workload.leading[1], 0)
    gate = gate.reshape(*workload.leading[: 2 if workload.gate == "token" else 1], 3)
    return replace(make_inputs(workload, dtype), gate=gate.to(dtype))


def same(actual: Results, truth: Results, tolerance: float) -> None:
    for name, exact in truth.items():
        fine = exact.isfinite()
        assert torch.equal(actual[name].isfinite(), fine), name
        difference = (actual[name].double() - exact)[fine].abs()
        if difference.numel():
            assert difference.max() <= tolerance * exact[fine].abs().max(), name


def compare(inputs: LoraInputs, tolerance: float) -> None:
    truth = run_autograd(definition, inputs.to(torch.float64))
    with poisoned_memory():
        actual = run_kernels(multi_lora_forward, multi_lora_backward, inputs)
    # The gradient of a gate of zero is what it is computed to be; an inf or NaN shows in that entry alone.
    on = inputs.gate != 0
    for results in (actual, truth):
        results["dgate"] = results["dgate"][on]
    same(actual, truth, tolerance)


@pytest.mark.parametrize("poison", POISON)
def test_poison_stays_with_the_samples_that_use_it(poison: str) -> None:
    compare(POISON[poison](drawn("one_block")), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_poison_stays_with_the_samples_that_use_it_in_16_bits(dtype: torch.dtype) -> None:
    compare(POISON["all"](drawn("one_block", dtype)), TOLERANCE[dtype])


@pytest.mark.parametrize("layer", [name for name in LAYERS if name != "one_block"])
def test_poison_stays_with_the_samples_that_use_it_in_every_path(layer: str) -> None:
    workload = LAYERS[layer]
    inputs = drawn(layer)
    if workload.ranks[1] > 2:
        inputs = POISON["all"](inputs)
    else:
        inputs = replace(POISON["x_nan_without_expert"](inputs), lora_a=changed(inputs.lora_a, 1, ((0, 3), NAN)))
    compare(inputs, TOLERANCE[torch.float32])


def test_an_expert_with_nan_that_no_sample_uses_changes_nothing() -> None:
    inputs = drawn("one_block")
    inputs = replace(inputs, gate=inputs.gate * torch.tensor([1.0, 0.0, 1.0]))
    clean, poisoned = (
        run_kernels(multi_lora_forward, multi_lora_backward, given) for given in (inputs, POISON["A_nan"](inputs))
    )
    for name in ("delta", "dx", "da_0", "db_0", "da_1", "db_1", "da_2", "db_2"):
        # Equal up to rounding where the common path met a NaN: the rare one adds in another order.
        torch.testing.assert_close(poisoned[name], clean[name], rtol=1e-5, atol=1e-5)
    assert torch.equal(poisoned["delta"], clean["delta"])
    assert torch.equal(poisoned["dgate"][:, [0, 2]], clean["dgate"][:, [0, 2]])


def test_elements_that_met_no_nan_keep_their_bits() -> None:
    """One output of expert 1 is NaN: all other outputs, and other samples' dx, have the bits they had without it."""
    inputs = drawn("one_block")
    poisoned = replace(inputs, lora_b=changed(inputs.lora_b, 1, ((3, 2), NAN)))
    results = [run_kernels(multi_lora_forward, multi_lora_backward, given) for given in (inputs, poisoned)]
    others = torch.arange(18) != 3
    assert torch.equal(results[0]["delta"][..., others], results[1]["delta"][..., others])
    assert torch.equal(results[0]["dx"][:2], results[1]["dx"][:2])
    assert results[1]["delta"][2, :, 3].isnan().all()
    assert not results[1]["dx"][:2].isnan().any()


@pytest.mark.parametrize("every_column", [True, False], ids=["gate_requires_grad", "constant_gates"])
@pytest.mark.parametrize("layer", ["one_block", "two_blocks"])
def test_forward_with_a_base_and_the_fused_forward(layer: str, every_column: bool) -> None:
    inputs = POISON["B_inf"](POISON["A_nan"](drawn(layer)))
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(18, 20, generator=generator), torch.randn(18, generator=generator)
    base = torch.randn(*inputs.x.shape[:-1], 18, generator=generator)
    arguments = (inputs.lora_a, inputs.lora_b, inputs.gate, inputs.scale, 0.0, False, None)
    wide = inputs.to(torch.float64)
    with poisoned_memory():
        y, _ = multi_lora_forward(LoraCall(inputs.x, base, *arguments, every_column=every_column))
        fused, _ = fused_base_forward(LoraCall(inputs.x, None, *arguments, every_column), weight, bias)
    delta = definition(wide)
    same({"y": y}, {"y": base.double() + delta}, 1e-5)
    same({"y": fused}, {"y": torch.nn.functional.linear(wide.x, weight.double(), bias.double()) + delta}, 1e-5)


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16], ids=str)
def test_gate_and_scale_are_multiplied_in_float32(narrow: torch.dtype) -> None:
    """A scale that float16 does not hold, and products that bfloat16 would round."""
    inputs = make_inputs(SMALL)
    gate = torch.tensor([[1.0, 0.3, -0.7], [0.0, 1.0, 1.0], [-1.0, 0.1, 0.0]]).to(narrow)
    inputs = replace(inputs, gate=gate, scale=(1e5, 3.1, 1.7), grad=inputs.grad * 1e-6)
    truth = run_autograd(multi_lora_loop, replace(inputs, scale=inputs.scale).to(torch.float64))
    actual = run_kernels(multi_lora_forward, multi_lora_backward, inputs)
    for name, exact in truth.items():
        tolerance = torch.finfo(narrow).eps if name == "dgate" else 1e-5
        worst = ((actual[name].double() - exact).abs() / exact.abs().amax(-1, keepdim=True).clamp_min(1e-30)).max()
        assert worst <= tolerance, name
    weight = torch.zeros(18, 20)
    fused, _ = fused_base_forward(
        LoraCall(inputs.x, None, inputs.lora_a, inputs.lora_b, gate, inputs.scale, 0.0, False, None), weight, None
    )
    same({"delta": fused}, {"delta": truth["delta"]}, 1e-5)


@pytest.mark.parametrize("ranks", [(0, 0, 3), (2, 0, 3), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("dropout", ["none", "shared", "per_expert"])
def test_experts_of_rank_0_add_nothing_and_have_a_gradient_of_zero(ranks: tuple[int, ...], dropout: str) -> None:
    inputs = make_inputs(
        replace(SMALL, ranks=ranks, dropout=0.0 if dropout == "none" else 0.3, per_expert=dropout == "per_expert")
    )
    truth = run_autograd(multi_lora_loop, inputs.to(torch.float64))
    with poisoned_memory():
        actual = run_kernels(multi_lora_forward, multi_lora_backward, inputs)
        through_autograd = run_autograd(partial(multi_lora_op, backend="triton"), inputs)
    for results in (actual, through_autograd):
        for name, exact in truth.items():
            assert results[name].shape == exact.shape, name
            torch.testing.assert_close(results[name].double(), exact, rtol=1e-4, atol=1e-4, msg=name)
