# SPDX-License-Identifier: Apache-2.0
"""The compiled router score and selection at every instruction set this machine runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmole_kernels import reference, router_score, router_select
from dmole_kernels.testing import few_roundings, judge, poisoned_memory, rejected, threads

_C = pytest.importorskip("dmole_kernels._C", exc_type=ImportError)
DTYPES = (torch.float32, torch.bfloat16)


def tensors(
    samples: int, tasks: int, width: int, hidden: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((samples, width), (tasks, hidden, width), (tasks, hidden), (tasks, width, hidden), (tasks, width))
    scales = (1.0, width**-0.5, 1.0, hidden**-0.5, 1.0)
    return [
        (torch.randn(*shape, dtype=torch.float64, generator=generator) * scale).to(dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def score(arguments: list[Tensor], decoder: str = "sigmoid") -> Tensor:
    return router_score(*arguments, decoder=decoder, backend="cpu")  # type: ignore[arg-type]


# One of everything, tails of every register width, more than one tile of samples and of features, the paper's order.
SHAPES = ((1, 1, 1, 1), (5, 3, 7, 2), (33, 2, 50, 17), (200, 2, 40, 5), (16, 4, 400, 24))


@pytest.mark.parametrize("decoder", ["sigmoid", "linear"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_a_few_roundings_of_float64(
    level: str, shape: tuple[int, int, int, int], dtype: torch.dtype, decoder: str
) -> None:
    """The rule of `testing`: root mean square over samples, the worst task of several draws."""
    actual, truth = [], []
    for seed in range(6):
        arguments = tensors(*shape, dtype, seed)
        with poisoned_memory():
            actual.append(score(arguments, decoder).t())
        truth.append(reference.router_score_forward(*(t.double() for t in arguments), decoder == "sigmoid").t())
    # A few samples' luck is not a verdict: all draws of a task side by side.
    found, exact = torch.cat(actual, 1), torch.cat(truth, 1)
    assert found.dtype == dtype
    # Two products, a sigmoid and a difference before the squares, each rounded once.
    expected = {"error": few_roundings(dtype, exact, roundings=8)}
    assert rejected(judge({"error": found}, expected, {"error": exact})) == []


@given(
    st.integers(0, 70), st.integers(0, 4), st.integers(1, 220), st.integers(1, 20), st.sampled_from(DTYPES),
    st.sampled_from(_C.available_isas()), st.sampled_from(("sigmoid", "linear")),
)  # fmt: skip
def test_any_shape(
    samples: int, tasks: int, width: int, hidden: int, dtype: torch.dtype, isa: str, decoder: str
) -> None:
    arguments = tensors(samples, tasks, width, hidden, dtype)
    before = _C.isa()
    _C.set_isa(isa)
    try:
        with poisoned_memory():
            error = score(arguments, decoder)
    finally:
        _C.set_isa(before)
    truth = reference.router_score_forward(*(t.double() for t in arguments), decoder == "sigmoid")
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(error.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_the_bits_do_not_depend_on_batch_mates_tasks_threads_or_the_run(level: str, dtype: torch.dtype) -> None:
    z, *weights = tensors(230, 3, 210, 20, dtype)
    with threads(1):
        together = score([z, *weights])
    with threads(2):
        assert torch.equal(score([z, *weights]), together)
    assert torch.equal(torch.cat([score([z[i : i + 1], *weights]) for i in (0, 100, 229)]), together[[0, 100, 229]])
    assert torch.equal(score([z, *(w[1:2] for w in weights)]), together[:, 1:2])


def test_a_nan_stays_with_its_sample(level: str) -> None:
    arguments = tensors(4, 2, 9, 3)
    exact = score(arguments)
    arguments[0][2, 5] = float("nan")
    error = score(arguments)
    assert error[2].isnan().all()
    assert torch.equal(error[[0, 1, 3]], exact[[0, 1, 3]])


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_a_saturated_sigmoid_is_zero_or_one(level: str, dtype: torch.dtype) -> None:
    z, we, be, wd, bd = tensors(2, 3, 8, 2, dtype)
    z.fill_(1.0)
    bd[0], bd[1], bd[2] = 1e4, -1e4, float("inf")
    assert score([z, we, be, wd, bd]).tolist() == [[0.0, 1.0, 0.0]] * 2


def test_any_strides_and_no_samples() -> None:
    z, *weights = tensors(6, 2, 10, 3)
    exact = score([z, *weights])
    strided = [w.transpose(1, -1).contiguous().transpose(1, -1) for w in weights]
    for view in (z.t().contiguous().t(), torch.cat([z, z], 1)[:, :10]):
        assert torch.equal(score([view, *strided]), exact)
    assert score([z[:0], *weights]).shape == (0, 2)
    assert score([z, *(w[:0] for w in weights)]).shape == (6, 0)


@pytest.mark.parametrize("decoder", ["sigmoid", "linear"])
def test_gradients(decoder: str) -> None:
    arguments = [t.requires_grad_() for t in tensors(5, 2, 6, 3)]
    score(arguments, decoder).square().sum().backward()
    wide = [t.detach().double().requires_grad_() for t in arguments]
    router_score(*wide, decoder=decoder).square().sum().backward()  # type: ignore[arg-type]
    for narrow, exact in zip(arguments, wide, strict=True):
        torch.testing.assert_close(narrow.grad, exact.grad.float(), rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]


@given(st.integers(0, 4), st.integers(0, 7), st.integers(1, 8), st.integers(0, 99), st.sampled_from(DTYPES))
def test_select_equals_the_definition(samples: int, tasks: int, top_k: int, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    error = torch.randint(0, 4, (samples, tasks), generator=generator).to(dtype)
    threshold = torch.randint(0, 4, (tasks,), generator=generator).float()
    gate = router_select(error, threshold, top_k=top_k, backend="cpu")
    assert gate.dtype == dtype
    assert torch.equal(gate, reference.router_select(error, threshold, top_k))


def test_select_takes_infinite_thresholds_and_never_a_nan() -> None:
    infinity = float("inf")
    error = torch.tensor([[0.1, infinity, 0.2], [float("nan"), infinity, 0.6]])
    threshold = torch.tensor([infinity, infinity, -infinity])
    assert router_select(error, threshold, backend="cpu").tolist() == [[1, 1, 0], [0, 1, 0]]


def selected(error: list[float], threshold: list[float], top_k: int) -> list[float]:
    """A row of the gate by the definition: admitted tasks by (error, task), the first top_k of them."""
    admitted = [t for t in range(len(error)) if error[t] <= threshold[t]]
    best = sorted(admitted, key=lambda t: (error[t], t))[:top_k]
    return [float(t in best) for t in range(len(error))]


@given(
    st.lists(st.sampled_from((0.5, 1.0, 2.0, float("inf"), -float("inf"), float("nan"))), min_size=12, max_size=12),
    st.lists(st.sampled_from((0.5, 1.0, float("inf"), -float("inf"))), min_size=6, max_size=6),
    st.integers(1, 6),
    st.sampled_from(DTYPES),
)
def test_an_admitted_infinite_error_keeps_its_place(
    errors: list[float], threshold: list[float], top_k: int, dtype: torch.dtype
) -> None:
    """Ties by the earlier task; a task that is not admitted takes no place, and a NaN is never admitted."""
    error = torch.tensor(errors).view(2, 6)
    gate = router_select(error.to(dtype), torch.tensor(threshold), top_k=top_k, backend="cpu")
    assert gate.tolist() == [selected(row, threshold, top_k) for row in error.tolist()]


def test_infinite_errors_are_taken_in_the_order_of_tasks() -> None:
    infinity = float("inf")
    error = torch.tensor([[infinity, 0.5, infinity, infinity]])
    threshold = torch.tensor([0.1, 0.1, infinity, infinity])
    places = [router_select(error, threshold, top_k=k, backend="cpu").tolist() for k in (1, 2)]
    assert places == [[[0, 0, 1, 0]], [[0, 0, 1, 1]]]


def test_errors_tell_what_to_do() -> None:
    arguments = tensors(2, 2, 4, 3)
    with pytest.raises(
        ValueError, match="backend='cpu' got float64; expected float32 or bfloat16. Cast the tensors or pass"
    ):
        score([t.double() for t in arguments])
    ops = torch.ops.dmole_kernels
    z, we, be, wd, bd = arguments
    with pytest.raises(ValueError, match="encoder_weight is BFloat16 and features Float; expected one dtype. Cast"):
        ops.cpu_router_score(z, *(t.bfloat16() for t in arguments[1:]), True)
    with pytest.raises(
        ValueError, match="features is Half; the cpu backend expects float32 or bfloat16. Cast it or pass"
    ):
        ops.cpu_router_score(*(t.half() for t in arguments), True)
    with pytest.raises(
        ValueError, match=r"features has shape \[2, 3\] and encoder_weight \[2, 3, 4\]; expected \[samples"
    ):
        ops.cpu_router_score(z[:, :3], we, be, wd, bd, True)
    for wrong in ((be[:1], wd, bd), (be, wd.transpose(1, 2), bd), (be, wd, bd[:, :1])):
        with pytest.raises(
            ValueError, match=r"encoder_bias has shape .*; expected those that belong to \[2, 3, 4\]. Stack"
        ):
            ops.cpu_router_score(z, we, *wrong, True)
    with pytest.raises(
        ValueError, match=r"error has shape \[2, 3\] and threshold \[2\]; expected \[samples, tasks\] and"
    ):
        ops.cpu_router_select(torch.zeros(2, 3), torch.zeros(2), 1)
    with pytest.raises(
        ValueError, match="backend='cpu' got float64; expected float32 or bfloat16. Cast the tensors or pass"
    ):
        router_select(torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1), backend="cpu")
