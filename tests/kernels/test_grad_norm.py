# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, func
from torch.autograd import forward_ad

from dmole_kernels import (
    BACKENDS,
    accumulate_gradient,
    accumulate_sketch,
    choose_backend,
    grad_norm_per_batch,
    grad_norm_per_sample,
    reference,
    sketch_relative_std,
)
from dmole_kernels._backend import DTYPES
from dmole_kernels._grad_norm import ACCUMULATE, NORM, SKETCH, cheaper_method
from dmole_kernels.testing import poisoned_memory

METHODS = ("auto", "direct", "ghost")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def definition(x: Tensor, grad: Tensor) -> Tensor:
    return torch.einsum("btp,btd->bpd", grad.double(), x.double()).flatten(1).norm(dim=1)


@pytest.mark.parametrize("method", METHODS)
def test_by_hand(method: str) -> None:
    """x = [[1, 0], [1, 1]], g = [[2], [1]]: G^T X = [3, 1], norm sqrt(10)."""
    x, grad = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]), torch.tensor([[[2.0], [1.0]]])
    assert float(grad_norm_per_sample(x, grad, method=method)) == pytest.approx(math.sqrt(10))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["float32", "bfloat16", "float64"]
)
def test_equals_the_definition_across_tiles(method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "GHOST_TILE", 4)
    monkeypatch.setattr(reference, "DIRECT_TILE", 5)
    x, grad = draw(3, 11, 7, dtype=dtype), draw(3, 11, 13, seed=1, dtype=dtype)
    with poisoned_memory():
        norm = grad_norm_per_sample(x, grad, method=method)  # type: ignore[arg-type]
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(norm.double(), definition(x, grad), rtol=1e-5, atol=1e-5)


@given(st.integers(0, 3), st.integers(0, 9), st.integers(1, 9), st.integers(1, 9), st.sampled_from(METHODS))
def test_any_shape(samples: int, tokens: int, width: int, outputs: int, method: str) -> None:
    x, grad = draw(samples, tokens, width), draw(samples, tokens, outputs, seed=1)
    norm = grad_norm_per_sample(x, grad, method=method)  # type: ignore[arg-type]
    torch.testing.assert_close(norm, definition(x, grad), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["direct", "ghost"])
def test_gradcheck(method: str) -> None:
    x, grad = draw(2, 3, 4).requires_grad_(), draw(2, 3, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, g: grad_norm_per_sample(x, g, method=method), (x, grad))  # type: ignore[arg-type]


def test_gradient_at_zero_is_zero() -> None:
    x = torch.zeros(1, 2, 3, requires_grad=True)
    grad_norm_per_sample(x, torch.zeros(1, 2, 4)).sum().backward()
    assert not x.grad.any()


def test_per_batch_is_the_norm_of_the_sum() -> None:
    x, grad = draw(2, 3, 4), draw(2, 3, 5, seed=1)
    expected = torch.einsum("btp,btd->pd", grad, x).norm()
    for method in METHODS:
        torch.testing.assert_close(grad_norm_per_batch(x, grad, method=method), expected)  # type: ignore[arg-type]


def test_the_choice_follows_the_flops() -> None:
    assert cheaper_method(32, 1024, 1024) == "ghost"
    assert cheaper_method(1024, 1024, 1024) == "direct"
    assert cheaper_method(0, 8, 8) == "direct"
    # Just above d p / (d + p) = 512 a second tile appears and symmetry pays.
    assert cheaper_method(600, 1024, 1024) == "ghost"


def test_accumulate_gradient_adds_batches() -> None:
    buffer = torch.zeros(5, 4, dtype=torch.float64)
    batches = [(draw(6, 4, seed=s), draw(6, 5, seed=s + 9)) for s in range(3)]
    for x, grad in batches:
        accumulate_gradient(buffer, x, grad)
    torch.testing.assert_close(buffer, sum(grad.t() @ x for x, grad in batches))


def test_the_sketch_is_linear_in_the_gradient() -> None:
    left, right = draw(5, 3), draw(4, 2, seed=1)
    whole, parts = (torch.zeros(3, 2, dtype=torch.float64) for _ in range(2))
    x, grad = draw(6, 4, seed=2), draw(6, 5, seed=3)
    accumulate_sketch(whole, x, grad, left, right)
    accumulate_sketch(parts, x[:2], grad[:2], left, right)
    accumulate_sketch(parts, x[2:], grad[2:], left, right)
    torch.testing.assert_close(whole, parts)
    torch.testing.assert_close(whole, left.t() @ (grad.t() @ x) @ right)


@pytest.mark.parametrize("rank", [1, 30])
def test_the_sketch_is_unbiased_and_reports_its_spread(rank: int) -> None:
    """300 sketches of one matrix: mean of the squares right, and the reported spread close to the one seen."""
    x, grad = draw(rank, 40), draw(rank, 50, seed=1)
    exact = float((grad.t() @ x).norm())
    size, norms, reported = 16, [], []
    generator = torch.Generator().manual_seed(2)
    for _ in range(300):
        left = torch.randn(50, size, dtype=torch.float64, generator=generator) / math.sqrt(size)
        right = torch.randn(40, size, dtype=torch.float64, generator=generator) / math.sqrt(size)
        sketch = torch.zeros(size, size, dtype=torch.float64)
        accumulate_sketch(sketch, x, grad, left, right)
        norms.append(float(sketch.norm()) / exact)
        reported.append(sketch_relative_std(sketch))
    ratios = torch.tensor(norms, dtype=torch.float64)
    assert float(ratios.square().mean()) == pytest.approx(1.0, abs=0.1)
    seen, said = float(ratios.std()), sum(reported) / len(reported)
    # Errs upwards, by 1/k + 1/l in the flatness: much for a flat spectrum at size 16, nothing for rank one.
    assert 0.85 * seen < said < (1.15 if rank == 1 else 2.0) * seen


def test_the_spread_of_an_empty_sketch_is_zero_and_of_any_64_x_64_small() -> None:
    assert sketch_relative_std(torch.zeros(64, 64)) == 0.0
    assert sketch_relative_std(draw(64, 1) @ draw(1, 64, seed=1)) < 0.13


def test_errors_tell_what_to_do() -> None:
    with pytest.raises(
        ValueError, match=r"x has shape \(2, 3, 4\) and grad \(2, 4, 5\); expected \[samples, tokens, feat"
    ):
        grad_norm_per_sample(draw(2, 3, 4), draw(2, 4, 5))
    with pytest.raises(ValueError, match="method='fast'; expected 'auto', 'direct' or 'ghost'"):
        grad_norm_per_sample(draw(2, 3, 4), draw(2, 3, 5), method="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"buffer has shape \(4, 5\); expected \(5, 4\). Allocate torch.zeros\(5, 4\)"):
        accumulate_gradient(draw(4, 5), draw(6, 4), draw(6, 5))
    with pytest.raises(
        ValueError, match=r"x has shape \(2, 3, 4\) and grad \(2, 3, 5\); expected \[rows, features\] for both"
    ):
        accumulate_gradient(draw(5, 4), draw(2, 3, 4), draw(2, 3, 5))
    with pytest.raises(
        ValueError, match=r"x has shape \(2, 3, 4\) and grad \(3, 2, 5\); expected \[..., features\] for both"
    ):
        grad_norm_per_batch(draw(2, 3, 4), draw(3, 2, 5))
    with pytest.raises(ValueError, match=r"x has shape \(\) and grad \(\); expected \[..., features\] for both"):
        grad_norm_per_batch(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(
        ValueError, match="grad is on meta and x on cpu; expected one device. Move one of them with .to"
    ):
        grad_norm_per_sample(draw(2, 3, 4), draw(2, 3, 5).to("meta"))
    with pytest.raises(ValueError, match="buffer is int64; expected a floating-point dtype. Cast it, e.g. with .float"):
        accumulate_gradient(torch.zeros(5, 4, dtype=torch.int64), draw(6, 4), draw(6, 5))
    with pytest.raises(ValueError, match="buffer is on meta and x on cpu; expected one device"):
        accumulate_gradient(draw(5, 4).to("meta"), draw(6, 4), draw(6, 5))
    x, grad, left, right = draw(6, 4), draw(6, 5), draw(5, 3), draw(4, 2)
    for sides in ((draw(4, 3), right), (left, draw(5, 2)), (draw(5), right), (left, draw(4))):
        shapes = rf"left has shape \({sides[0].shape[0]},.* and right \({sides[1].shape[0]},"
        with pytest.raises(
            ValueError, match=rf"{shapes}.*; expected \[5, k\] and \[4, l\]. Draw left for grad's width"
        ):
            accumulate_sketch(draw(3, 2), x, grad, *sides)
    with pytest.raises(ValueError, match=r"sketch has shape \(2, 3\); expected \(3, 2\). Allocate torch.zeros\(3, 2\)"):
        accumulate_sketch(draw(2, 3), x, grad, left, right)
    with pytest.raises(ValueError, match="right is on meta and x on cpu; expected one device"):
        accumulate_sketch(draw(3, 2), x, grad, left, right.to("meta"))


def test_each_op_chooses_by_its_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    x, grad, left, right, sketch = draw(3, 4), draw(3, 5), draw(5, 2), draw(4, 2), draw(2, 2)
    tables = {"grad_norm_per_sample": NORM, "accumulate_gradient": ACCUMULATE, "accumulate_sketch": SKETCH}
    monkeypatch.setitem(BACKENDS, "other", None)
    monkeypatch.setitem(DTYPES, "other", None)
    for op, table in tables.items():
        with pytest.raises(ValueError, match=f"backend='other' has no kernel for {op}; expected 'auto' or one of"):
            choose_backend("other", op=op)
        with monkeypatch.context() as patch:
            patch.setitem(table, "other", {} if table is NORM else None)  # type: ignore[arg-type]
            chosen = {name: choose_backend("other", op=name).name for name, t in tables.items() if t is table}
            assert chosen == {op: "other"}
    for call in (
        lambda: grad_norm_per_sample(x[None], grad[None], backend="other"),
        lambda: accumulate_gradient(draw(5, 4), x, grad, backend="other"),
        lambda: accumulate_sketch(sketch, x, grad, left, right, backend="other"),
    ):
        with pytest.raises(ValueError, match="backend='other' has no kernel for "):
            call()


# The first dual tensor makes torch script its own derivatives.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_transforms_and_forward_mode_are_refused() -> None:
    x, grad, buffer, sketch = draw(2, 3, 4), draw(2, 3, 5), draw(5, 4), draw(2, 2)
    left, right = draw(5, 2), draw(4, 2)
    calls = {
        "grad_norm_per_sample": lambda t: grad_norm_per_sample(t, grad),
        "accumulate_gradient": lambda t: accumulate_gradient(buffer, t[0], grad[0]),
        "accumulate_sketch": lambda t: accumulate_sketch(sketch, t[0], grad[0], left, right),
    }
    for name, call in calls.items():
        refused = pytest.raises(NotImplementedError, match=f"{name} is under a torch.func transform or in forward-mode")
        with refused:
            func.grad(lambda t, call=call: (call(t), t.sum())[1])(x)
        with refused:
            func.vmap(lambda t, call=call: (call(t), t.sum())[1])(x[None])
        with refused, forward_ad.dual_level():
            call(forward_ad.make_dual(x, x))
