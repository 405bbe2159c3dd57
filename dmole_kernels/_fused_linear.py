# SPDX-License-Identifier: Apache-2.0
"""
    Equals `multi_lora(x, F.linear(x, weight, bias), lora_a, lora_b, gate, scale, ...)` with a frozen weight and bias,
    the base product and the experts' in one launch (`triton_backend.fused_base`): dx = dY W + multi_lora's dx.

An experiment of the Triton backend, behind `MultiLoRALinear(fuse_base=True)`; not a registered op, so eager only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmole_kernels import triton_backend
from dmole_kernels._backend import choose_backend, without_autocast
from dmole_kernels._multi_lora import (
    DropoutMode,
    check_dropout,
    check_experts,
    check_seed,
    multi_lora_derivative,
    save_for_derivative,
    seed_for,
)

_forward = triton_backend.kernel("fused_base", "fused_base_forward")


def fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], gate: Tensor,
    scale: Sequence[float], *, dropout: float = 0.0, dropout_mode: DropoutMode = "shared", seed: Tensor | None = None,
    backend: str = "triton",
) -> Tensor:  # fmt: skip
    """The layer's output, [..., out_features] in x's dtype; differentiable in x, the gate and the experts.

    Args:
        weight: [out_features, in_features], and bias [out_features]: frozen.
        backend: has to come out as "triton".
        The others as `multi_lora`'s.

    Raises:
        ValueError: as `multi_lora`; for a weight or bias that requires grad, another backend, or under torch.compile.
    """
    check_experts(x, None, lora_a, lora_b, gate, scale)
    check_dropout(dropout, dropout_mode)
    check_seed(seed)
    choice = choose_backend(backend, x.device.type, x.dtype)
    if choice.name != "triton":
        raise ValueError(
            f"fused_linear got backend {choice.name!r} ({choice.reason}); expected 'triton'. Pass backend='triton', or "
            f"leave fuse_base off."
        )
    if torch.compiler.is_compiling():
        raise ValueError(
            "fused_linear is being compiled; expected eager mode, it is no registered op. Leave fuse_base off."
        )
    if weight.shape != (lora_b[0].shape[0], x.shape[-1]) or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} and bias {None if bias is None else tuple(bias.shape)}; expected "
            f"{(lora_b[0].shape[0], x.shape[-1])} and its first side. Pass the base layer's own."
        )
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError(
            "weight or bias requires grad; expected both frozen, for they get no gradient here. Call requires_grad_("
            "False), or leave fuse_base off."
        )
    seed = seed_for(x.device, dropout, seed)
    every_column = gate.requires_grad and torch.is_grad_enabled()
    settings = (list(scale), dropout, dropout_mode == "per_expert", seed, choice.name, every_column)
    run = _FusedLinear.apply if torch.is_grad_enabled() else _run
    y: Tensor
    y, _ = run(settings, weight, bias, x, gate, *lora_a, *lora_b)
    return y


def _run(
    settings: tuple[Any, ...], weight: Tensor, bias: Tensor | None, x: Tensor, gate: Tensor, *experts: Tensor
) -> tuple[Tensor, Tensor]:
    """y and S."""
    scale, dropout, per_expert, seed, _, every_column = settings
    count = len(experts) // 2
    with without_autocast(x.device.type):
        output: tuple[Tensor, Tensor] = _forward(
            x, weight, bias, list(experts[:count]), list(experts[count:]), gate.reshape(-1, len(scale)), scale, dropout,
            per_expert, seed, every_column,
        )  # fmt: skip
    return output


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: tuple[Any, ...], weight: Tensor, bias: Tensor | None, x: Tensor, gate: Tensor,
        *experts: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        count = len(experts) // 2
        output = _run(settings, weight, bias, x, gate, *experts)
        inputs = (x, None, list(experts[:count]), list(experts[count:]), gate, *settings)
        save_for_derivative(ctx, inputs, output)
        ctx.weight = weight
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_shrunk: None) -> tuple[Tensor | None, ...]:
        dx, _, da, db, dgate, *_ = multi_lora_derivative(ctx, grad, grad_shrunk)
        if dx is not None and grad is not None:
            dx += grad @ ctx.weight.to(grad.dtype)
        return None, None, None, dx, dgate, *da, *db
