# SPDX-License-Identifier: Apache-2.0
"""The compiled masked max-pool at every instruction set this machine runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dmole_kernels import masked_max_pool, reference
from dmole_kernels.testing import poisoned_memory, threads

_C = pytest.importorskip("dmole_kernels._C", exc_type=ImportError)
DTYPES = (torch.float32, torch.bfloat16)


def pool_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Few distinct values, so that the first of equals matters; 600 columns are more than two blocks.
    hidden = torch.randint(-3, 4, (3, 17, 600), generator=generator).to(dtype)
    hidden[0, 4, 7] = hidden[0, 9, 7] = hidden[1, 16, 599] = float("nan")
    hidden[2, :, 3] = -float("inf")
    hidden[2, 3, 5], hidden[2, 4, 5] = -0.0, 0.0
    mask = torch.rand(3, 17, generator=generator) > 0.4
    mask[0, 4] = mask[0, 9] = mask[1, 16] = True
    return hidden, mask


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_pool_equals_the_reference_bit_for_bit(level: str, dtype: torch.dtype) -> None:
    hidden, mask = pool_inputs(dtype)
    expected = reference.masked_max_pool(hidden, mask)
    views = (
        (hidden, mask),
        (hidden.transpose(0, 1).contiguous().transpose(0, 1), mask.t().contiguous().t()),
        (hidden.transpose(1, 2).contiguous().transpose(1, 2), mask),
    )
    for count in (1, 2):
        for view, its_mask in views:
            with threads(count), poisoned_memory():
                values, token = torch.ops.dmole_kernels.masked_max_pool(view, its_mask, "cpu")
            torch.testing.assert_close(values, expected[0], rtol=0, atol=0, equal_nan=True)
            assert torch.equal(token, expected[1])


def test_pool_of_a_sample_without_tokens_and_of_no_samples() -> None:
    hidden, mask = pool_inputs(torch.float32)
    values, token = torch.ops.dmole_kernels.masked_max_pool(hidden, mask & False, "cpu")
    assert bool((values == -float("inf")).all()) and not token.any()
    assert masked_max_pool(hidden[:0], mask[:0], backend="cpu").shape == (0, 600)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_pool_of_negative_values_under_a_mask_of_any_numbers(level: str, dtype: torch.dtype) -> None:
    """Every number but zero is True, and the maximum of negative values is not the zero of a hidden token."""
    generator = torch.Generator().manual_seed(0)
    hidden = (-1.0 - torch.rand(2, 9, 37, generator=generator)).to(dtype)
    mask = torch.tensor([[-1.0, 0.0, -0.0, 0.5, -2e9, 0.0, 1e-30, -1e-30, 0.0], [0, 0, -3, 0, 0, 7, 0, 0, 2]])
    kept = [[0, 3, 4, 6, 7], [2, 5, 8]]
    expected = [[max(hidden[b, t, d].item() for t in kept[b]) for d in range(37)] for b in range(2)]
    with poisoned_memory():
        assert masked_max_pool(hidden, mask, backend="cpu").tolist() == expected
        # Booleans made from bytes may hold any of them.
        some_bytes = (mask != 0).to(torch.uint8) * torch.tensor([1, 2, 255, 128, 64, 1, 6, 254, 16], dtype=torch.uint8)
        values, _ = torch.ops.dmole_kernels.masked_max_pool(hidden, some_bytes.view(torch.bool), "cpu")
    assert values.tolist() == expected


def test_pool_gradients() -> None:
    hidden = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    found = torch.autograd.grad(masked_max_pool(hidden, mask, backend="cpu").square().sum(), hidden)[0]
    exact = torch.autograd.grad(masked_max_pool(hidden, mask, backend="reference").square().sum(), hidden)[0]
    assert torch.equal(found, exact)


def test_errors_tell_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"hidden has shape \[2, 3, 4\] and mask \[2, 3\] of Long; expected .* bool"):
        torch.ops.dmole_kernels.cpu_masked_max_pool(torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(
        ValueError, match="backend='cpu' got float64; expected float32 or bfloat16. Cast the tensors or pass"
    ):
        masked_max_pool(torch.zeros(1, 1, 1, dtype=torch.float64), torch.ones(1, 1), backend="cpu")
