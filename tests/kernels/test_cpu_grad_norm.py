# SPDX-License-Identifier: Apache-2.0
"""The compiled gradient norms at every instruction set this machine runs, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dmole_kernels import (
    GradNormRecorder,
    accumulate_gradient,
    accumulate_sketch,
    grad_norm_per_batch,
    grad_norm_per_sample,
)
from dmole_kernels._grad_norm import cheaper_method
from dmole_kernels.testing import poisoned_memory, threads

_C = pytest.importorskip("dmole_kernels._C", exc_type=ImportError)
METHODS = ("auto", "direct", "ghost")
DTYPES = (torch.float32, torch.bfloat16)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair(samples: int, tokens: int, width: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return draw(samples, tokens, width, dtype=dtype), draw(samples, tokens, outputs, seed=1, dtype=dtype)


def norms(x: Tensor, grad: Tensor, method: str = "auto") -> Tensor:
    return grad_norm_per_sample(x, grad, method=method, backend="cpu")  # type: ignore[arg-type]


def definition(x: Tensor, grad: Tensor) -> Tensor:
    return torch.einsum("btp,btd->bpd", grad.double(), x.double()).flatten(1).norm(dim=1)


def check(norm: Tensor, x: Tensor, grad: Tensor) -> None:
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), definition(x, grad), rtol=2e-6, atol=1e-6)


# One element, tails of every register width, several tiles of both methods with ragged last ones, primes.
SHAPES = ((1, 1, 1, 1), (2, 5, 17, 33), (1, 230, 31, 23), (1, 500, 8, 9), (2, 37, 530, 211), (3, 97, 64, 48))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(level: str, shape: tuple[int, int, int, int], dtype: torch.dtype, method: str) -> None:
    x, grad = pair(*shape, dtype)
    with poisoned_memory():
        check(norms(x, grad, method), x, grad)


@given(
    st.integers(0, 3), st.integers(0, 210), st.integers(1, 70), st.integers(1, 70),
    st.sampled_from(METHODS), st.sampled_from(DTYPES), st.sampled_from(_C.available_isas()),
)  # fmt: skip
def test_any_shape(
    samples: int, tokens: int, width: int, outputs: int, method: str, dtype: torch.dtype, isa: str
) -> None:
    x, grad = pair(samples, tokens, width, outputs, dtype)
    before = _C.isa()
    _C.set_isa(isa)
    try:
        with poisoned_memory():
            norm = norms(x, grad, method).double()
    finally:
        _C.set_isa(before)
    # A sum over tokens may cancel: then what counts is how long its terms are, one after the other.
    exact, reach = definition(x, grad), (x.double().norm(dim=2) * grad.double().norm(dim=2)).sum(1)
    assert bool(((norm.square() - exact.square()).abs() <= 4e-6 * exact.square() + 2**-24 * reach.square()).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_the_bits_do_not_depend_on_batch_mates_padding_threads_or_the_run(
    level: str, dtype: torch.dtype, method: str
) -> None:
    x, grad = pair(3, 220, 130, 200, dtype)
    grad[0, :9] = 0.0
    grad[1, 100:] = 0.0
    with threads(1):
        together = norms(x, grad, method)
    with threads(2):
        assert torch.equal(norms(x, grad, method), together)
    alone = torch.cat(
        [
            norms(x[:1, 9:], grad[:1, 9:], method),
            norms(x[1:2, :100], grad[1:2, :100], method),
            norms(x[2:], grad[2:], method),
        ]
    )
    assert torch.equal(alone, together)


@pytest.mark.parametrize("method", METHODS)
def test_padding_is_not_read_and_what_is_read_shows(level: str, method: str) -> None:
    x, grad = pair(2, 6, 5, 4, torch.float32)
    grad[0, :2] = 0.0
    grad[0, 5:] = -0.0
    expected = norms(x, grad, method)
    x[0, :2] = x[0, 5:] = float("nan")
    assert torch.equal(norms(x, grad, method), expected)
    grad[1, 3, 2] = float("nan")
    assert norms(x, grad, method).isnan().tolist() == [False, True]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_has_norm_zero_and_gradient_zero(method: str) -> None:
    x = draw(2, 3, 4).requires_grad_()
    norm = norms(x, torch.zeros(2, 3, 5), method)
    assert norm.tolist() == [0.0, 0.0]
    norm.sum().backward()
    assert x.grad is not None and not x.grad.any()
    assert norms(torch.ones(2, 0, 4), torch.ones(2, 0, 5), method).tolist() == [0.0, 0.0]
    assert norms(torch.ones(0, 3, 4), torch.ones(0, 3, 5), method).shape == (0,)


def test_rows_that_are_only_one_dependent_direction_do_not_cancel_to_nan() -> None:
    x, grad = torch.ones(1, 4, 3), torch.tensor([1.0, -1.0, 1e4, -1e4])[None, :, None].expand(1, 4, 2).contiguous()
    assert 0.0 <= float(norms(x, grad, "ghost")) < 10.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_any_strides(dtype: torch.dtype, method: str) -> None:
    x, grad = pair(2, 21, 19, 23, dtype)
    views = (
        (x.transpose(0, 1).contiguous().transpose(0, 1), grad[..., None].expand(2, 21, 23, 3)[..., 1]),
        (x.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([grad, grad], 2)[..., :23]),
        (torch.stack([x, x], 1)[:, 0], grad),
    )
    for strided_x, strided_grad in views:
        torch.testing.assert_close(norms(strided_x, strided_grad, method), norms(x, grad, method), rtol=0, atol=0)
    expanded = x[:1].expand(2, 21, 19)
    check(norms(expanded, grad, method), expanded, grad)


def test_mixed_dtypes_are_computed_in_float32() -> None:
    x, grad = draw(2, 9, 8, dtype=torch.bfloat16), draw(2, 9, 7, seed=1)
    assert torch.equal(norms(x, grad), norms(x.float(), grad))
    assert torch.equal(norms(x, grad.half()), norms(x.float(), grad.half().float()))


@pytest.mark.parametrize("method", METHODS)
def test_gradients(method: str) -> None:
    x, grad = (t.requires_grad_() for t in pair(2, 30, 12, 17, torch.float32))
    norms(x, grad, method).sum().backward()
    wide_x, wide_grad = (t.detach().double().requires_grad_() for t in (x, grad))
    definition(wide_x, wide_grad).sum().backward()
    for narrow, wide in ((x, wide_x), (grad, wide_grad)):
        assert narrow.grad is not None and wide.grad is not None
        torch.testing.assert_close(narrow.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)


def test_per_batch() -> None:
    x, grad = pair(3, 40, 24, 16, torch.float32)
    whole = grad_norm_per_batch(x, grad, backend="cpu")
    torch.testing.assert_close(
        whole.double(), torch.einsum("btp,btd->pd", grad.double(), x.double()).norm().float().double()
    )


def test_the_choice_is_printable_and_the_one_made() -> None:
    assert cheaper_method(32, 1024, 1024, backend="cpu") == "ghost"
    assert cheaper_method(1024, 1024, 1024, backend="cpu") == "direct"
    assert cheaper_method(0, 8, 8, backend="cpu") == "direct"
    # d p / (d + p) = 512, and symmetry saves nearly half.
    assert cheaper_method(600, 1024, 1024, backend="cpu") == "ghost"
    # Of 200 tokens 190 are padding: by its shape the sample is direct's, by what is left ghost's.
    x, grad = pair(1, 200, 40, 40, torch.float32)
    grad[:, 10:] = 0.0
    assert (cheaper_method(200, 40, 40, backend="cpu"), cheaper_method(10, 40, 40, backend="cpu")) == (
        "direct",
        "ghost",
    )
    assert torch.equal(norms(x, grad), norms(x, grad, "ghost"))


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(6, 4, 5), (1, 1, 1), (300, 530, 200), (0, 3, 2)], ids=str)
def test_accumulate_gradient(level: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, width, outputs = shape
    x, grad = draw(rows, width, dtype=dtype), draw(rows, outputs, seed=1, dtype=dtype)
    start = draw(outputs, width, seed=2)
    results = []
    for count in (1, 2, 2):
        buffer = start.clone()
        with threads(count), poisoned_memory():
            accumulate_gradient(buffer, x, grad, backend="cpu")
        results.append(buffer)
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])
    torch.testing.assert_close(
        results[0].double(), start.double() + grad.double().t() @ x.double(), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(6, 4, 5, 3, 2), (450, 130, 70, 64, 64), (0, 3, 2, 2, 2)], ids=str)
def test_accumulate_sketch(level: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    rows, width, outputs, k, size = shape
    x, grad = draw(rows, width, dtype=dtype), draw(rows, outputs, seed=1, dtype=dtype)
    left, right, start = draw(outputs, k, seed=2), draw(width, size, seed=3), draw(k, size, seed=4)
    results = []
    for count in (1, 2, 2):
        sketch = start.clone()
        with threads(count), poisoned_memory():
            accumulate_sketch(sketch, x, grad, left, right, backend="cpu")
        results.append(sketch)
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])
    added = left.double().t() @ (grad.double().t() @ x.double()) @ right.double()
    error = (results[0].double() - start.double() - added).norm()
    assert float(error) <= 1e-6 * float(added.norm() + start.double().norm())


def test_buffers_of_any_strides() -> None:
    x, grad, left, right = draw(6, 4), draw(6, 5, seed=1), draw(5, 3, seed=2), draw(4, 2, seed=3)
    buffer, sketch = torch.zeros(4, 5).t(), torch.zeros(2, 3).t()
    accumulate_gradient(buffer, x, grad, backend="cpu")
    accumulate_sketch(sketch, x.t().contiguous().t(), grad, left.t().contiguous().t(), right, backend="cpu")
    torch.testing.assert_close(buffer, grad.t() @ x)
    torch.testing.assert_close(sketch, left.t() @ (grad.t() @ x) @ right)


def test_a_bfloat16_buffer_is_rounded_once() -> None:
    x, grad, buffer = draw(60, 4), draw(60, 5, seed=1), torch.ones(5, 4, dtype=torch.bfloat16)
    accumulate_gradient(buffer, x, grad, backend="cpu")
    assert torch.equal(buffer, (1.0 + grad.double().t() @ x.double()).bfloat16())


def test_the_recorder_uses_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).requires_grad_(False)
    x = draw(3, 4, 6)
    found = {}
    for backend in ("cpu", "reference"):
        linears = {"0": model[0], "2": model[2]}
        with GradNormRecorder(linears, method="sketch", backend=backend) as recorder:  # type: ignore[arg-type]
            model(x).square().sum().backward()
        found[backend] = {name: norm.weight for name, norm in recorder.norms().items()}
    assert found["cpu"] == pytest.approx(found["reference"], rel=1e-5)


def test_errors_tell_what_to_do() -> None:
    wide = draw(2, 3, 4, dtype=torch.float64)
    with pytest.raises(
        ValueError, match="backend='cpu' got float64; expected float32 or bfloat16. Cast the tensors or pass"
    ):
        norms(wide, wide)
    with pytest.raises(
        ValueError, match="x is Half; the cpu backend expects float32 or bfloat16. Cast it or pass backend"
    ):
        torch.ops.dmole_kernels.cpu_squared_norm(wide.half(), wide.half(), "auto")
    with pytest.raises(ValueError, match="method is 'fast'; expected 'auto', 'direct' or 'ghost'. Use 'auto'"):
        torch.ops.dmole_kernels.cpu_squared_norm(wide.float(), wide.float(), "fast")
    ops = torch.ops.dmole_kernels
    with pytest.raises(ValueError, match=r"grad_norm_per_sample: x has shape \[2, 4\]; expected \[samples, tokens, f"):
        ops.cpu_squared_norm(draw(2, 4), draw(2, 5), "auto")
    with pytest.raises(
        ValueError, match=r"x has shape \[2, 3, 4\] and grad \[2, 4, 5\]; expected the same but for the"
    ):
        ops.cpu_squared_norm(draw(2, 3, 4), draw(2, 4, 5), "auto")
    with pytest.raises(ValueError, match=r"accumulate_gradient: x has shape \[2, 3, 4\]; expected \[rows, features\]"):
        ops.cpu_accumulate_gradient(torch.zeros(5, 4), draw(2, 3, 4), draw(2, 3, 5))
    with pytest.raises(
        ValueError, match=r"accumulate_gradient: buffer has shape \[4, 5\]; expected \[5, 4\]. Allocate"
    ):
        ops.cpu_accumulate_gradient(torch.zeros(4, 5), draw(2, 4), draw(2, 5))
    sides = (draw(5, 3), draw(4, 3))
    with pytest.raises(
        ValueError, match=r"accumulate_sketch: x has shape \[4\], left \[5, 3\], right \[4, 3\]; expected"
    ):
        ops.cpu_accumulate_sketch(torch.zeros(3, 3), draw(4), draw(5), *sides)
    for wrong, expected in (
        ((torch.zeros(3, 3), draw(4, 3), draw(4, 3)), r"left has shape \[4, 3\]; expected \[5, 3\]"),
        ((torch.zeros(3, 3), draw(5, 3), draw(5, 3)), r"right has shape \[5, 3\]; expected \[4, 3\]"),
        ((torch.zeros(3, 2), *sides), r"sketch has shape \[3, 2\]; expected \[3, 3\]"),
    ):
        sketch, left, right = wrong
        with pytest.raises(ValueError, match=f"accumulate_sketch: {expected}. Allocate it with that shape"):
            ops.cpu_accumulate_sketch(sketch, draw(2, 4), draw(2, 5), left, right)
