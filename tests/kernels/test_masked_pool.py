# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from dmole_kernels import masked_max_pool

MASK = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]])


def draw(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("mask", [MASK, MASK.bool(), MASK.float()], ids=["int64", "bool", "float32"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_equals_the_loop(mask: torch.Tensor, dtype: torch.dtype) -> None:
    hidden = draw(dtype)
    expected = torch.stack([hidden[b][MASK[b].bool()].amax(0) for b in range(3)])
    assert torch.equal(masked_max_pool(hidden, mask), expected)


def test_padding_and_batch_mates_change_nothing() -> None:
    hidden = draw()
    alone = masked_max_pool(hidden[:1, :2], MASK[:1, :2])
    hidden[0, 2:] = 1e9
    assert torch.equal(masked_max_pool(hidden, MASK)[:1], alone)
    hidden[0, 2:] = float("nan")
    assert torch.equal(masked_max_pool(hidden, MASK)[:1], alone)


def test_gradcheck() -> None:
    hidden = draw().requires_grad_()
    assert torch.autograd.gradcheck(lambda h: masked_max_pool(h, MASK), (hidden,))


def test_errors_tell_what_to_do() -> None:
    with pytest.raises(
        ValueError, match=r"hidden has shape \(3, 4, 5\) and mask \(3, 5\); expected \[samples, tokens, feat"
    ):
        masked_max_pool(draw(), torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"mask hides every token of samples \[1\]; expected at least one. Drop those"):
        masked_max_pool(draw(), MASK * torch.tensor([1, 0, 1])[:, None])
    with pytest.raises(ValueError, match=r"mask hides every token of samples \[0, 1, 2\]"):
        masked_max_pool(torch.zeros(3, 0, 5), torch.zeros(3, 0))
    with pytest.raises(
        ValueError, match=r"hidden has shape \(4, 5\) and mask \(3, 4\); expected \[samples, tokens, feat"
    ):
        masked_max_pool(draw()[0], MASK)
    with pytest.raises(ValueError, match="hidden is int64; expected a floating-point dtype. Cast it, e.g. with .float"):
        masked_max_pool(draw().long(), MASK)
    with pytest.raises(
        ValueError, match="mask is on meta and hidden on cpu; expected one device. Move one of them with"
    ):
        masked_max_pool(draw(), MASK.to("meta"))
