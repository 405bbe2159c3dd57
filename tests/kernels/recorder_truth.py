# SPDX-License-Identifier: Apache-2.0
"""Frozen layers, losses, and the norms of their weight gradients by torch.autograd.grad in float64, with weights that
require grad.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from dmole_kernels import GradNorm, GradNormRecorder

Quantity = Literal["accumulated", "per_batch", "per_sample"]
QUANTITIES: tuple[Quantity, ...] = ("accumulated", "per_batch", "per_sample")
EACH_QUANTITY = pytest.mark.parametrize("quantity", QUANTITIES)
Function = Callable[[nn.Linear, Tensor], Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_layer(bias: bool = True, width: int = 6, dtype: torch.dtype = torch.float64) -> nn.Linear:
    """Frozen, with a norm of about one, so that a layer may follow itself."""
    layer = nn.Linear(width, width, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(draw(width, width, seed=7) / width**0.5)
        if bias:
            layer.bias.copy_(draw(width, seed=8))
    return layer.requires_grad_(False).to(dtype)


def truth(function: Function, layer: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the loss function(layer, x) by autograd."""
    layer.requires_grad_(True)
    parameters = (layer.weight,) if layer.bias is None else (layer.weight, layer.bias)
    found = torch.autograd.grad(function(layer, x), parameters)
    layer.requires_grad_(False)
    return found[0], found[1] if layer.bias is not None else torch.zeros(1, dtype=torch.float64)


def expected(quantity: Quantity, function: Function, layer: nn.Linear, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Norms [values] of weight and bias: one value (accumulated), one for each batch, or one for each sample."""
    if quantity == "per_sample":
        batches = [x[i : i + 1] for x in batches for i in range(x.shape[0])]
    pairs = [truth(function, layer, x) for x in batches]
    if quantity == "accumulated":
        pairs = [(sum(w for w, _ in pairs), sum(b for _, b in pairs))]  # type: ignore[list-item]
    weights, biases = zip(*pairs, strict=True)
    return torch.stack([w.norm() for w in weights]), torch.stack([b.norm() for b in biases])


def values(norm: GradNorm, quantity: Quantity) -> tuple[Tensor, Tensor]:
    if quantity == "accumulated":
        assert not norm.weight_values.numel()
        return torch.tensor([norm.weight], dtype=torch.float64), torch.tensor([norm.bias], dtype=torch.float64)
    assert norm.weight == pytest.approx(float(norm.weight_values.mean()))
    return norm.weight_values, norm.bias_values


def check(
    quantity: Quantity, function: Function, batches: list[Tensor], layer: nn.Linear | None = None,
    right: Function | None = None,
) -> GradNorm:  # fmt: skip
    """Records one backward call of function(layer, x) for each batch, and compares with autograd (of `right`)."""
    layer = make_layer() if layer is None else layer
    with GradNormRecorder({"layer": layer}, quantity=quantity) as recorder:
        for x in batches:
            function(layer, x).backward()
    norm = recorder.norms()["layer"]
    truths = expected(quantity, right or function, layer, batches)
    for found, value in zip(values(norm, quantity), truths, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-12)
    assert norm.calls == len(batches)
    assert layer.weight.grad is None
    return norm


BATCHES = [draw(4, 3, 6, seed=s) for s in range(2)]


def looped(layer: nn.Linear, x: Tensor) -> Tensor:
    for _ in range(3):
        x = torch.tanh(layer(x))
    return x.square().sum()


def times(count: int) -> Function:
    """The layer `count` times in a row, without checkpoints."""

    def function(layer: nn.Linear, x: Tensor) -> Tensor:
        for _ in range(count):
            x = torch.tanh(layer(x))
        return x.square().sum()

    return function
