# SPDX-License-Identifier: Apache-2.0
"""Gradient norms, sketch, router score and pooling in the interpreter, against the definitions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dmole_kernels import reference
from dmole_kernels.testing import poisoned_memory
from dmole_kernels.triton_backend.grad_norm import (
    accumulate_gradient,
    accumulate_sketch,
    squared_norm_direct,
    squared_norm_ghost,
)
from dmole_kernels.triton_backend.router_score import masked_max_pool, router_score_forward


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("norm", [squared_norm_direct, squared_norm_ghost], ids=["direct", "ghost"])
@pytest.mark.parametrize("shape", [(3, 37, 19, 23), (1, 1, 1, 1), (2, 16, 32, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_equal_the_definition(norm: object, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    samples, tokens, width, outputs = shape
    x, grad = draw(samples, tokens, width, dtype=dtype), draw(samples, tokens, outputs, seed=1, dtype=dtype)
    with poisoned_memory():
        total = norm(x, grad)  # type: ignore[operator]
        last = norm(x[-1:], grad[-1:])  # type: ignore[operator]
    exact = torch.einsum("btp,btd->bpd", grad.double(), x.double()).square().sum((1, 2))
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(total[-1:], last), "a sample's norm must not depend on its batch mates"


@pytest.mark.parametrize("norm", [squared_norm_direct, squared_norm_ghost], ids=["direct", "ghost"])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0)], ids=["no_samples", "no_tokens"])
def test_norms_of_nothing_are_zero(norm: object, shape: tuple[int, int]) -> None:
    total = norm(draw(*shape, 8), draw(*shape, 8))  # type: ignore[operator]
    assert torch.equal(total, torch.zeros(shape[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accumulated_gradient_and_sketch_add_up_over_batches(dtype: torch.dtype) -> None:
    buffer, sketch = torch.zeros(23, 40), torch.zeros(40, 17)
    left, right = draw(23, 40, seed=7), draw(40, 17, seed=8)
    exact = torch.zeros(23, 40, dtype=torch.float64)
    for seed in range(2):
        x, grad = draw(37, 40, seed=seed, dtype=dtype), draw(37, 23, seed=seed + 9, dtype=dtype)
        with poisoned_memory():
            accumulate_gradient(buffer, x, grad)
            accumulate_sketch(sketch, x, grad, left, right)
        exact += grad.double().t() @ x.double()
    torch.testing.assert_close(buffer.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sketch.double(), left.double().t() @ exact @ right.double(), rtol=1e-4, atol=1e-3)


def test_buffers_that_cannot_be_changed_in_place_are_refused() -> None:
    x, grad = draw(4, 8), draw(4, 8)
    with pytest.raises(ValueError, match=r"buffer has strides \(1, 8\); expected neighbouring in_features"):
        accumulate_gradient(draw(8, 8).t(), x, grad)
    with pytest.raises(ValueError, match=r"sketch has strides \(1, 2\); expected a contiguous one"):
        accumulate_sketch(draw(2, 2).t(), x, grad, draw(8, 2), draw(8, 2))


def router_tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((19, 37), (3, 21, 37), (3, 21), (3, 37, 21), (3, 37))
    return [draw(*shape, seed=seed, dtype=dtype) / 4 for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("sigmoid", [True, False], ids=["sigmoid", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_router_score_errs_no_more_than_the_reference(sigmoid: bool, dtype: torch.dtype) -> None:
    tensors = router_tensors(dtype)
    with poisoned_memory():
        error = router_score_forward(*tensors, sigmoid)
    exact = reference.router_score_forward(*(tensor.double() for tensor in tensors), sigmoid)
    in_dtype = reference.router_score_forward(*tensors, sigmoid)
    allowed = 2 * (in_dtype.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (error.double() - exact).abs().max() <= allowed
    assert torch.equal(router_score_forward(tensors[0][5:6], *tensors[1:], sigmoid), error[5:6])


def test_router_score_of_no_samples_and_of_too_large_a_hidden_size() -> None:
    features, *weights = router_tensors()
    assert router_score_forward(features[:0], *weights, True).shape == (0, 3)
    large = [torch.zeros(1, 300, 4), torch.zeros(1, 300), torch.zeros(1, 4, 300), torch.zeros(1, 4)]
    with pytest.raises(ValueError, match="encoder_weight has a hidden size of 300; expected at most 256"):
        router_score_forward(torch.zeros(2, 4), *large, True)


def test_pooling_equals_the_reference_with_ties_padding_and_nan() -> None:
    hidden = torch.randint(-3, 3, (3, 7, 140), generator=torch.Generator().manual_seed(0)).float()
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0, 1, 0, 1, 1, 1, 1], [1] * 7], dtype=torch.bool)
    hidden[2, 3, 5] = float("nan")
    hidden[0, 5, 0] = float("nan")
    with poisoned_memory():
        values, tokens = masked_max_pool(hidden, mask)
    expected_values, expected_tokens = reference.masked_max_pool(hidden, mask)
    torch.testing.assert_close(values, expected_values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(tokens, expected_tokens)
