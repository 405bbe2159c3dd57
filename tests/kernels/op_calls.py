# SPDX-License-Identifier: Apache-2.0
"""The differentiable ops as functions of tensors alone, with shapes that fit them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dmole_kernels import grad_norm_per_sample, masked_max_pool, multi_lora, router_score

Call = Callable[..., Tensor]
SCALE = [2.0, 0.5]
MASK = torch.tensor([[True, True, False], [False, True, True]])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(backend: str, dropout: float = 0.0) -> Call:
    def call(x: Tensor, base: Tensor, gate: Tensor, a0: Tensor, a1: Tensor, b0: Tensor, b1: Tensor) -> Tensor:
        return multi_lora(
            x, base, [a0, a1], [b0, b1], gate, SCALE, dropout=dropout, dropout_mode="per_expert",
            seed=torch.tensor(7), backend=backend,
        )  # fmt: skip

    return call


# Differentiable ops as functions of tensors alone.
CALLS: dict[str, Callable[[str], Call]] = {
    "multi_lora": lora,
    "multi_lora_dropout": lambda name: lora(name, 0.4),
    "grad_norm_direct": lambda name: lambda x, grad: grad_norm_per_sample(x, grad, method="direct", backend=name),
    "grad_norm_ghost": lambda name: lambda x, grad: grad_norm_per_sample(x, grad, method="ghost", backend=name),
    "grad_norm": lambda name: lambda x, grad: grad_norm_per_sample(x, grad, backend=name),
    "router_score": lambda name: lambda *tensors: router_score(*tensors, backend=name),
    "router_score_linear": lambda name: lambda *tensors: router_score(*tensors, decoder="linear", backend=name),
    "masked_max_pool": lambda name: lambda hidden: masked_max_pool(hidden, MASK, backend=name),
}
LORA_SHAPES = ((2, 3, 6), (2, 3, 5), (2, 2), (1, 6), (3, 6), (5, 1), (5, 3))
ROUTER_SHAPES = ((4, 6), (3, 2, 6), (3, 2), (3, 6, 2), (3, 6))
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "multi_lora": LORA_SHAPES,
    "multi_lora_dropout": LORA_SHAPES,
    "grad_norm_direct": ((2, 3, 4), (2, 3, 5)),
    "grad_norm_ghost": ((2, 3, 4), (2, 3, 5)),
    "grad_norm": ((2, 3, 4), (2, 3, 5)),
    "router_score": ROUTER_SHAPES,
    "router_score_linear": ROUTER_SHAPES,
    "masked_max_pool": ((2, 3, 5),),
}


def tensors_of(name: str, seed: int = 0) -> tuple[Tensor, ...]:
    return tuple(draw(*shape, seed=100 * seed + i) for i, shape in enumerate(SHAPES[name]))


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
