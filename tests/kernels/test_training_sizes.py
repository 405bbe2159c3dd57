# SPDX-License-Identifier: Apache-2.0
"""Sizes beyond every blocking constant, at every level of the cpu backend and on the reference; planted faults of the
kinds that only such sizes show, each caught by the very checks that the kernels pass.

Truth is float64; what is expected of a kernel comes from rounding analysis (`dmole_kernels.testing`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dmole_kernels import (
    BACKENDS,
    ExpertBank,
    accumulate_gradient,
    accumulate_sketch,
    cpu,
    frozen_linear,
    grad_norm_per_sample,
    masked_max_pool,
    multi_lora,
    reference,
)
from dmole_kernels._lora_call import LoraCall, Wanted
from dmole_kernels._multi_lora import BACKWARD, FORWARD
from dmole_kernels.testing import (
    LoraInputs,
    Workload,
    expected_errors,
    few_roundings,
    judge,
    make_inputs,
    multi_lora_loop,
    product_error,
    rejected,
    run_autograd,
)

Kernels = tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, ...]]]
# 760 rows: expert 0 has 700 of them, so do several blocks of 128 rows; 700 outputs pass tiles of 512 columns.
TRAINING = Workload(
    name="training", leading=(760,), in_features=300, out_features=700, ranks=(16, 24, 5), pattern="random"
)
LEVELS = ["reference", *(cpu.available_isas() if "cpu" in BACKENDS else ())]


@pytest.fixture(params=LEVELS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "reference":
        return FORWARD["reference"], BACKWARD["reference"]
    before = cpu.isa()
    cpu.set_isa(request.param)
    request.addfinalizer(lambda: cpu.set_isa(before))
    return FORWARD["cpu"], BACKWARD["cpu"]


@pytest.fixture(params=LEVELS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "reference":
        return "reference"
    before = cpu.isa()
    cpu.set_isa(request.param)
    request.addfinalizer(lambda: cpu.set_isa(before))
    return "cpu"


@cache
def training(dtype: torch.dtype) -> tuple[LoraInputs, Tensor, dict[str, Tensor], dict[str, float]]:
    """Inputs, base, truth and expected errors; gates differ from row block to row block."""
    inputs = make_inputs(TRAINING, dtype)
    gate = torch.zeros_like(inputs.gate)
    gate[:700, 0] = 1.5
    gate[650:, 1] = -0.5
    gate[::97, 2] = 2.0
    inputs = LoraInputs(**{**vars(inputs), "gate": gate})
    base = torch.randn(760, 700, generator=torch.Generator().manual_seed(5)).to(dtype)
    truth = run_autograd(multi_lora_loop, inputs.to(torch.float64))
    del truth["dgate"]
    return inputs, base, truth, expected_errors(inputs)


def faults(kernels: Kernels, dtype: torch.dtype) -> list[str]:
    """What the rule has against a forward and a backward at training size."""
    inputs, base, truth, expected = training(dtype)
    forward, backward = kernels
    delta, _ = forward(inputs.call(every_column=False))
    y, shrunk = forward(inputs.call(base, every_column=False))
    wanted = Wanted(True, False, [True] * 3)
    dx, da, db, _ = backward(inputs.call(), inputs.grad, shrunk, wanted)
    ranks = list(TRAINING.ranks)
    found = {"delta": delta, "dx": dx}
    for e, (part_a, part_b) in enumerate(zip(da.split(ranks), db.split(ranks), strict=True)):
        found |= {f"da_{e}": part_a, f"db_{e}": part_b.t()}
    whole = base.double() + truth["delta"]
    # The sum with the base is rounded once more, at the size of the sum.
    added = expected["delta"] + few_roundings(dtype, whole, roundings=1)
    return rejected(judge(found, expected, truth)) + rejected(judge({"y": y}, {"y": added}, {"y": whole}))


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@DTYPES
def test_multi_lora(kernels: Kernels, dtype: torch.dtype) -> None:
    assert faults(kernels, dtype) == []


def with_output(change: Callable[[Tensor, LoraCall], Tensor]) -> Callable[[Kernels], Kernels]:
    def broken(kernels: Kernels) -> Kernels:
        def forward(call: LoraCall) -> tuple[Tensor, Tensor]:
            y, shrunk = kernels[0](call)
            return change(y.clone(), call), shrunk

        return forward, kernels[1]

    return broken


def base_missing_from_column_512(y: Tensor, call: LoraCall) -> Tensor:
    if call.base is not None:
        y[:, 512:] -= call.base[:, 512:]
    return y


def second_block_overwrites(place: int) -> Callable[[Kernels], Kernels]:
    """dA (1) or dB (2) of an expert from its last block of 128 rows alone."""

    def broken(kernels: Kernels) -> Kernels:
        def backward(call: LoraCall, grad: Tensor, shrunk: Tensor, wanted: Wanted) -> tuple[Tensor, ...]:
            results = list(kernels[1](call, grad, shrunk, wanted))
            last = LoraCall(
                call.x[128:256], None, call.lora_a, call.lora_b, call.gate[128:256], call.scale  # type: ignore[index]
            )  # fmt: skip
            part = reference.multi_lora_backward(last, grad[128:256], shrunk[128:256], wanted)[place]
            results[place] = results[place].clone()
            results[place][:16] = part[:16]
            return tuple(results)

        return kernels[0], backward

    return broken


BROKEN = {
    "base_missing_from_column_512": with_output(base_missing_from_column_512),
    "second_block_of_rows_overwrites_da": second_block_overwrites(1),
    "second_block_of_rows_overwrites_db": second_block_overwrites(2),
    "rows_from_512_on_without_experts": with_output(
        lambda y, call: torch.cat([y[:512], y[512:] * 0 if call.base is None else call.base[512:]])
    ),
}


@DTYPES
@pytest.mark.parametrize("name", BROKEN)
def test_a_planted_fault_is_caught(name: str, dtype: torch.dtype) -> None:
    assert faults(BROKEN[name]((FORWARD["reference"], BACKWARD["reference"])), dtype)


def rows(count: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sum_faults(accumulate: Callable[[Tensor, Tensor, Tensor], object], dtype: torch.dtype) -> list[str]:
    """A sum into a 1024 x 1024 buffer whose gradient rows begin with zeros."""
    x, grad = rows(300, 1024, dtype, 1), rows(300, 1024, dtype, 2)
    grad[::3, :40] = 0.0
    grad[7] = 0.0
    buffer = rows(1024, 1024, torch.float32, 3)
    truth = buffer.double() + grad.double().t() @ x.double()
    accumulate(buffer, x, grad)
    expected = product_error(grad.t(), x.t(), torch.float32) + few_roundings(torch.float32, truth, roundings=1)
    return rejected(judge({"buffer": buffer}, {"buffer": expected}, {"buffer": truth}))


@DTYPES
def test_accumulated_gradients(backend: str, dtype: torch.dtype) -> None:
    assert sum_faults(lambda b, x, g: accumulate_gradient(b, x, g, backend=backend), dtype) == []


def last_tile_missing(buffer: Tensor, x: Tensor, grad: Tensor) -> None:
    kept = buffer[:, 512:].clone()
    accumulate_gradient(buffer, x, grad, backend="reference")
    buffer[:, 512:] = kept


def zeros_at_the_start_are_padding(buffer: Tensor, x: Tensor, grad: Tensor) -> None:
    shown = (grad[:, 0] != 0)[:, None]
    accumulate_gradient(buffer, x, torch.where(shown, grad, 0.0).to(grad.dtype), backend="reference")


@DTYPES
@pytest.mark.parametrize("fault", [last_tile_missing, zeros_at_the_start_are_padding])
def test_a_planted_fault_of_the_sum_is_caught(fault: Callable[..., None], dtype: torch.dtype) -> None:
    assert sum_faults(fault, dtype)


@DTYPES
def test_accumulated_sketches(backend: str, dtype: torch.dtype) -> None:
    x, grad = rows(300, 1024, dtype, 1), rows(300, 1024, dtype, 2)
    grad[::3, :40] = 0.0
    left, right = rows(1024, 64, torch.float32, 3) / 8, rows(1024, 64, torch.float32, 4) / 8
    sketch = torch.zeros(64, 64)
    accumulate_sketch(sketch, x, grad, left, right, backend=backend)
    truth = (grad.double() @ left.double()).t() @ (x.double() @ right.double())
    assert float((sketch - truth).norm() / truth.norm()) < 2e-6


def norm_faults(norm: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> list[str]:
    x, grad = rows(3 * 400, 1024, dtype, 1).view(3, 400, 1024), rows(3 * 400, 700, dtype, 2).view(3, 400, 700)
    grad[:, ::5, :64] = 0.0
    grad[1, 350:] = 0.0
    truth = (grad.double().transpose(1, 2) @ x.double()).flatten(1).norm(dim=1)
    found = norm(x, grad)
    worst = float(((found.double() - truth) / truth).abs().max())
    return [] if worst < 2e-5 else [f"relative error {worst:.2g}"]


@DTYPES
@pytest.mark.parametrize("method", ["direct", "ghost", "auto"])
def test_gradient_norms(backend: str, method: str, dtype: torch.dtype) -> None:
    def norm(x: Tensor, grad: Tensor) -> Tensor:
        return grad_norm_per_sample(x, grad, method=method, backend=backend)  # type: ignore[arg-type]

    assert norm_faults(norm, dtype) == []


NORM_FAULTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "last_column_tile_missing": lambda x, g: grad_norm_per_sample(x[..., :512], g, backend="reference"),
    "last_outputs_missing": lambda x, g: grad_norm_per_sample(x, g[..., :640], backend="reference"),
    "rows_that_begin_with_zeros_are_padding": lambda x, g: grad_norm_per_sample(
        x, torch.where(g[..., :1] != 0, g, 0.0).to(g.dtype), backend="reference"
    ),
}


@DTYPES
@pytest.mark.parametrize("name", NORM_FAULTS)
def test_a_planted_fault_of_the_norms_is_caught(name: str, dtype: torch.dtype) -> None:
    assert norm_faults(NORM_FAULTS[name], dtype)


def test_the_norm_s_derivative_has_the_sign_of_the_upstream_gradient(backend: str) -> None:
    x, grad = rows(12, 9, torch.float32, 1).view(3, 4, 9), rows(12, 7, torch.float32, 2).view(3, 4, 7)
    upstream = torch.tensor([1.5, -2.0, -0.25])
    wide = [t.double().requires_grad_() for t in (x, grad)]
    exact = (wide[1].transpose(1, 2) @ wide[0]).flatten(1).norm(dim=1)
    expected = torch.autograd.grad(exact, wide, upstream.double())
    narrow = [t.clone().requires_grad_() for t in (x, grad)]
    found = torch.autograd.grad(grad_norm_per_sample(*narrow, backend=backend), narrow, upstream)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-5, atol=1e-6)
    assert not any(torch.allclose(one.double(), -two, rtol=0.1) for one, two in zip(found, expected, strict=True))


@DTYPES
def test_the_base_s_product(backend: str, dtype: torch.dtype) -> None:
    x, weight, bias = rows(700, 700, dtype, 1), rows(700, 700, dtype, 2), rows(1, 700, dtype, 3)[0]
    y = frozen_linear(x, weight, bias, backend=backend)
    truth = F.linear(x.double(), weight.double(), bias.double())
    assert not rejected(judge({"y": y}, {"y": product_error(x, weight, dtype, bias)}, {"y": truth}))


@DTYPES
def test_pooling_under_negative_masks_of_negative_values(backend: str, dtype: torch.dtype) -> None:
    hidden = -rows(4 * 70, 700, dtype, 1).view(4, 70, 700).abs() - 1
    mask = torch.tensor([[-1, 0, 1, 0, 2, -3, 0] * 10] * 4)
    pooled = masked_max_pool(hidden, mask, backend=backend)
    assert torch.equal(pooled, hidden[:, mask[0] != 0].amax(1))
    # A mask of which only positive numbers count would give another maximum.
    assert not torch.equal(pooled, hidden[:, mask[0] > 0].amax(1))


def test_frozen_experts_are_described_as_frozen() -> None:
    bank = ExpertBank(6, 4)
    bank.add("old", 2, alpha=4.0)
    bank.add("new", 3, alpha=1.0)
    bank.freeze("old")
    assert bank.describe() == {
        "old": {"rank": 2, "alpha": 4.0, "trainable": False}, "new": {"rank": 3, "alpha": 1.0, "trainable": True},
    }  # fmt: skip
    other = ExpertBank(6, 4)
    other.restore(bank.describe())
    assert [p.requires_grad for p in other.parameters()] == [False, False, True, True]


def test_the_public_op_at_training_size(backend: str) -> None:
    inputs, base, truth, expected = training(torch.float32)
    y = multi_lora(
        inputs.x, base, inputs.lora_a, inputs.lora_b, inputs.gate, inputs.scale, backend=backend
    )  # fmt: skip
    whole = base.double() + truth["delta"]
    added = expected["delta"] + few_roundings(torch.float32, whole, roundings=1)
    assert not rejected(judge({"y": y}, {"y": added}, {"y": whole}))
