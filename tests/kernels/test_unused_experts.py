# SPDX-License-Identifier: Apache-2.0
"""A gate of zero means zero: an expert with inf or NaN harms only the samples that use it; gates are multiplied in at
least float32. The reference is the specification; float64 sums over rows are its truth."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from dmole_kernels import (
    BACKENDS,
    ExpertGates,
    MultiLoRALinear,
    dropout_keep_mask,
    masked_max_pool,
    multi_lora,
    router_select,
)

D, P, T = 6, 5, 3
SCALE = [2.0, 0.5, 1.5]
# Expert 1 is the bad one: samples 1 and 3 use it, samples 0, 2 and 4 do not.
GATE = torch.tensor([[1.0, 0.0, -0.5], [0.5, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
CLEAN, HARMED = [0, 2, 4], [1, 3]
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-12}
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
KERNELS = pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("cpu", "reference")])


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def experts(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    ranks = (2, 3, 1)
    lora_a = [draw(rank, D, seed=10 + e).to(dtype) for e, rank in enumerate(ranks)]
    lora_b = [draw(P, rank, seed=20 + e).to(dtype) for e, rank in enumerate(ranks)]
    return lora_a, lora_b


def truth(
    x: Tensor, base: Tensor, lora_a: list[Tensor], lora_b: list[Tensor], gate: Tensor, grad: Tensor,
    dropout: float, mode: str, seed: int,
) -> dict[str, Tensor]:  # fmt: skip
    """In float64 over pairs of a sample and an expert that it uses: what it does not use is never read."""
    leaves = [t.detach().double().requires_grad_() for t in (x, base, *lora_a, *lora_b)]
    x64, base64, *rest = leaves
    a64, b64 = rest[:3], rest[3:]
    rows = []
    for sample in range(len(gate)):
        y = base64[sample]
        for e in range(3):
            if gate[sample, e] != 0:
                kept = x64[sample]
                if dropout:
                    stream = e if mode == "per_expert" else 0
                    keep = dropout_keep_mask(seed, len(gate) * T, D, dropout, stream=stream).view(-1, T, D)[sample]
                    kept = kept * keep / (1.0 - dropout)
                y = y + gate[sample, e].double() * SCALE[e] * (kept @ a64[e].t() @ b64[e].t())
        rows.append(y)
    y = torch.stack(rows)
    # Samples apart, so that one with NaN in y leaves the gradients of the others as they are.
    y.backward(grad.double())
    return {
        "y": y.detach(), "dx": x64.grad, **{f"da{e}": a64[e].grad for e in range(3)},
        **{f"db{e}": b64[e].grad for e in range(3)},
    }  # fmt: skip


@EVERY_DTYPE
@pytest.mark.parametrize("where", ["a", "b", "both"])
@pytest.mark.parametrize("trained", [False, True], ids=["constant", "trained"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")], ids=["inf", "nan"])
@pytest.mark.parametrize("dropout,mode", [(0.0, "shared"), (0.4, "shared"), (0.4, "per_expert")], ids=str)
def test_a_bad_expert_harms_only_the_samples_that_use_it(
    dtype: torch.dtype, where: str, trained: bool, bad: float, dropout: float, mode: Literal["shared", "per_expert"]
) -> None:
    lora_a, lora_b = experts(dtype)
    if where != "b":
        lora_a[1][0, 1] = bad
    if where != "a":
        lora_b[1][2, 1] = -bad
    x, base, grad = (draw(5, T, n, seed=n).to(dtype) for n in (D, P, P))
    gate = GATE.clone().requires_grad_(trained)
    leaves = [t.clone().requires_grad_() for t in (x, base, *lora_a, *lora_b)]
    y = multi_lora(
        leaves[0], leaves[1], leaves[2:5], leaves[5:8], gate, SCALE, dropout=dropout, dropout_mode=mode,
        seed=torch.tensor(11), backend="reference",
    )  # fmt: skip
    y.backward(grad)
    expected = truth(x, base, lora_a, lora_b, GATE, grad, dropout, mode, 11)
    found = {"y": y.detach(), "dx": leaves[0].grad, **{f"da{e}": leaves[2 + e].grad for e in range(3)},
             **{f"db{e}": leaves[5 + e].grad for e in range(3)}}  # fmt: skip
    tolerance = DTYPES[dtype]
    for name, value in found.items():
        right = expected[name]
        if name in ("y", "dx"):
            assert not value[HARMED].isfinite().all() or name == "dx"
            value, right = value[CLEAN], right[CLEAN]
        elif name.endswith("1"):
            continue  # the bad expert's own
        assert right.isfinite().all()
        torch.testing.assert_close(value.double(), right, rtol=tolerance, atol=tolerance * float(right.abs().max()))
    assert torch.equal(leaves[1].grad, grad)
    if trained:
        # Of a good expert, by the rows of every sample: also where the gate is zero.
        e = 2
        kept = x.double()
        if dropout:
            keep = dropout_keep_mask(11, 5 * T, D, dropout, stream=e if mode == "per_expert" else 0).view(5, T, D)
            kept = kept * keep / (1.0 - dropout)
        delta = SCALE[e] * (kept @ lora_a[e].double().t() @ lora_b[e].double().t())
        slope = (grad.double() * delta).sum((1, 2))
        torch.testing.assert_close(
            gate.grad[:, e].double(), slope, rtol=max(tolerance, 1e-6), atol=tolerance * float(slope.abs().max()) + 1e-6
        )


@EVERY_DTYPE
@KERNELS
def test_bad_rows_harm_no_expert_that_they_do_not_use(dtype: torch.dtype, backend: str) -> None:
    """Sample 3 has NaN in x and in the gradient of y, and uses expert 1 alone."""
    if backend == "cpu" and dtype not in (torch.float32, torch.bfloat16):
        pytest.skip("the cpu backend computes in float32 and bfloat16")
    lora_a, lora_b = experts(dtype)
    x, base, grad = (draw(5, T, n, seed=n).to(dtype) for n in (D, P, P))
    x[3, 1, 2] = float("nan")
    grad[3, 0, 1] = float("inf")
    leaves = [t.clone().requires_grad_() for t in (x, base, *lora_a, *lora_b)]
    y = multi_lora(leaves[0], leaves[1], leaves[2:5], leaves[5:8], GATE, SCALE, backend=backend)
    y.backward(grad)
    expected = truth(x, base, lora_a, lora_b, GATE, grad, 0.0, "shared", 0)
    tolerance = DTYPES[dtype]
    for place, name in ((2, "da0"), (4, "da2"), (5, "db0"), (7, "db2")):
        right = expected[name]
        assert right.isfinite().all()
        torch.testing.assert_close(
            leaves[place].grad.double(), right, rtol=tolerance, atol=tolerance * float(right.abs().max())
        )


@EVERY_DTYPE
@pytest.mark.parametrize("trained", [False, True], ids=["constant", "trained"])
@pytest.mark.parametrize("ambient", [False, True], ids=["explicit", "ambient"])
def test_a_layer_with_a_bad_expert(dtype: torch.dtype, trained: bool, ambient: bool) -> None:
    torch.manual_seed(0)
    gates = ExpertGates()
    layer = MultiLoRALinear(nn.Linear(D, P, dtype=dtype), gates=gates, backend="reference")
    names = ("good", "bad", "other")
    for name in names:
        layer.bank.add(name, 2, alpha=3.0)
        nn.init.normal_(layer.bank.expert(name).lora_b)
    with torch.no_grad():
        layer.bank.expert("bad").lora_b.fill_(float("nan"))
        layer.bank.expert("bad").lora_a[0].fill_(float("inf"))
    x, grad = draw(5, T, D, seed=1).to(dtype), draw(5, T, P, seed=2).to(dtype)
    leaf, gate = x.clone().requires_grad_(), GATE.clone().requires_grad_(trained)
    if ambient:
        with gates.use(gate, names):
            y = layer(leaf)
    else:
        y = layer(leaf, gate, names)
    y.backward(grad)

    x64 = x.double().requires_grad_()
    rows = x64 @ layer.base.weight.double().t() + layer.base.bias.double()
    pairs = {}
    for column, name in ((0, "good"), (2, "other")):
        expert = layer.bank.expert(name)
        a, b = (t.detach().to(dtype).double().requires_grad_() for t in (expert.lora_a, expert.lora_b))
        pairs[name] = (a, b)
        rows = rows + GATE[:, column, None, None].double() * expert.scale * (x64 @ a.t() @ b.t())
    rows.backward(grad.double())
    tolerance = DTYPES[dtype] * 4
    assert not y[HARMED].isfinite().all(-1).any()
    compared = [(y.detach()[CLEAN], rows.detach()[CLEAN]), (leaf.grad[CLEAN], x64.grad[CLEAN])]
    for name, pair in pairs.items():
        expert = layer.bank.expert(name)
        compared += [(expert.lora_a.grad, pair[0].grad), (expert.lora_b.grad, pair[1].grad)]
    for value, right in compared:
        torch.testing.assert_close(value.double(), right, rtol=tolerance, atol=tolerance * float(right.abs().max()))


@pytest.mark.parametrize("gate_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@KERNELS
def test_gates_are_multiplied_in_at_least_float32(gate_dtype: torch.dtype, backend: str) -> None:
    """A bfloat16 product of gate and scale was 1.9e-3 off."""
    lora_a, lora_b = experts(torch.float32)
    x = draw(5, T, D, seed=1)
    gate, scale = torch.rand(5, 3, generator=torch.Generator().manual_seed(3)).to(gate_dtype), [1 / 3, 0.7, 1.1]
    y = multi_lora(x, None, lora_a, lora_b, gate, scale, backend=backend)
    right = sum(
        gate[:, e, None, None].double() * scale[e] * (x.double() @ lora_a[e].double().t() @ lora_b[e].double().t())
        for e in range(3)
    )
    assert float((y.double() - right).abs().max() / right.abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@KERNELS
def test_a_float16_gate_of_one_with_a_scale_of_1e5_is_finite(dtype: torch.dtype, backend: str) -> None:
    if backend == "cpu" and dtype == torch.float16:
        pytest.skip("the cpu backend computes in float32 and bfloat16")
    x, a, b = torch.ones(2, 4), torch.full((1, 4), 2.0**-12), torch.ones(3, 1)
    x, a, b = (t.to(dtype).requires_grad_() for t in (x, a, b))
    gate = torch.ones(2, 1, dtype=torch.float16, requires_grad=True)
    y = multi_lora(x, None, [a], [b], gate, [1e5], backend=backend)
    torch.testing.assert_close(y.double(), torch.full((2, 3), 4 * 2.0**-12 * 1e5).double(), rtol=5e-3, atol=0.0)
    (y * 1e-4).sum().backward()
    for tensor in (x, a, b, gate):
        assert tensor.grad.isfinite().all()
        assert tensor.grad.any()


@KERNELS
@pytest.mark.parametrize("ranks", [(0,), (0, 0), (2, 0), (0, 3), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("mode", ["shared", "per_expert"])
def test_a_rank_of_zero_adds_nothing_and_has_a_backward(
    ranks: tuple[int, ...], mode: Literal["shared", "per_expert"], backend: str
) -> None:
    x, gate = draw(2, T, D, seed=1).requires_grad_(), draw(2, len(ranks), seed=2).requires_grad_()
    base = draw(2, T, P, seed=3).requires_grad_()
    lora_a = [draw(rank, D, seed=4 + e).requires_grad_() for e, rank in enumerate(ranks)]
    lora_b = [draw(P, rank, seed=8 + e).requires_grad_() for e, rank in enumerate(ranks)]
    for dropout in (0.0, 0.3):
        for tensor in (x, gate, base, *lora_a, *lora_b):
            tensor.grad = None
        seed = torch.tensor(5)
        y = multi_lora(
            x, base, lora_a, lora_b, gate, [2.0] * len(ranks), dropout=dropout, dropout_mode=mode, seed=seed,
            backend=backend,
        )  # fmt: skip
        y.square().sum().backward()
        wide = [t.detach().double().requires_grad_() for t in (x, base, gate, *lora_a, *lora_b)]
        right = wide[1]
        for e, rank in enumerate(ranks):
            if rank:
                keep = torch.ones(2, T, D, dtype=torch.float64)
                if dropout:
                    stream = e if mode == "per_expert" else 0
                    keep = dropout_keep_mask(5, 2 * T, D, dropout, stream=stream).view(2, T, D) / (1.0 - dropout)
                delta = (wide[0] * keep) @ wide[3 + e].t() @ wide[3 + len(ranks) + e].t()
                right = right + wide[2][:, e, None, None] * 2.0 * delta
        right.square().sum().backward()
        torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=1e-5)
        for tensor, one in zip((x, base, gate, *lora_a, *lora_b), wide, strict=True):
            assert tensor.grad.shape == tensor.shape
            expected = torch.zeros_like(one) if one.grad is None else one.grad
            torch.testing.assert_close(tensor.grad.double(), expected, rtol=1e-4, atol=1e-4)


@KERNELS
@pytest.mark.parametrize("shape", [(0, 0, 3), (0, 4, 3), (2, 3, 0)], ids=str)
def test_pools_without_samples_tokens_or_features(shape: tuple[int, ...], backend: str) -> None:
    hidden = torch.zeros(shape, requires_grad=True)
    pooled = masked_max_pool(hidden, torch.ones(shape[:2], dtype=torch.bool), backend=backend)
    assert pooled.shape == (shape[0], shape[2])
    pooled.sum().backward()
    assert hidden.grad.shape == shape


@KERNELS
def test_an_admitted_infinite_error_keeps_its_place(backend: str) -> None:
    inf, nan = float("inf"), float("nan")
    error = torch.tensor([[inf, inf, 0.5], [inf, 2.0, inf], [nan, inf, 0.1], [5.0, inf, inf]])
    threshold = torch.tensor([1.0, inf, 1.0])
    expected = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    assert torch.equal(router_select(error, threshold, top_k=2, backend=backend), expected)
    # Not admitted errors take no place from admitted ones, however small they are.
    error, threshold = torch.tensor([[0.1, inf, 0.2, 0.3]]), torch.tensor([0.0, inf, 0.0, 0.5])
    assert torch.equal(router_select(error, threshold, top_k=2, backend=backend), torch.tensor([[0.0, 1.0, 0.0, 1.0]]))
    assert torch.equal(router_select(error, threshold, top_k=1, backend=backend), torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
