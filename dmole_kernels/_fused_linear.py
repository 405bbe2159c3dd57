# SPDX-License-Identifier: Apache-2.0
"""
    Equals `multi_lora(x, F.linear(x, weight, bias), lora_a, lora_b, gate, scale, ...)` with a frozen weight and bias,
    with the base product and the experts in one launch (`triton_backend.fused_base`): dx = dY W + dx of multi_lora.

An experiment of the Triton backend, behind `MultiLoRALinear(fuse_base=True)`; not a registered op, so eager only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmole_kernels import triton_backend
from dmole_kernels._backend import without_autocast
from dmole_kernels._lora_call import LoraCall
from dmole_kernels._multi_lora import MULTI_LORA, DropoutMode, Saved, check_dropout, check_experts, check_seed, seed_for


def fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], gate: Tensor,
    scale: Sequence[float], *, dropout: float = 0.0, dropout_mode: DropoutMode = "shared", seed: Tensor | None = None,
    backend: str = "triton",
) -> Tensor:  # fmt: skip
    """The layer's output, [..., out_features] in x's dtype; differentiable in x, the gate and the experts.

    Args:
        weight: [out_features, in_features], and bias [out_features]: frozen.
        backend: must resolve to "triton".
        The others: as in `multi_lora`.

    Raises:
        ValueError: as `multi_lora`; for a weight or bias that requires grad, another backend, or under torch.compile.
    """
    check_experts(x, None, lora_a, lora_b, gate, scale)
    check_dropout(dropout, dropout_mode)
    check_seed(seed)
    call = LoraCall(
        x, None, lora_a, lora_b, gate.reshape(-1, len(scale)), scale, dropout, dropout_mode == "per_expert",
        seed_for(x.device, dropout, seed), gate.requires_grad and torch.is_grad_enabled(),
    )  # fmt: skip
    return run_fused(call, weight, bias, MULTI_LORA.pick(backend, x.device.type, x.dtype))


def run_fused(call: LoraCall, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """The output, for checked arguments."""
    x, outputs = call.x, call.outputs
    assert x is not None
    if backend != "triton":
        raise ValueError(
            f"fused_linear got backend {backend!r}; expected 'triton'. Pass backend='triton', or leave fuse_base off."
        )
    if torch.compiler.is_compiling():
        raise ValueError(
            "fused_linear is being compiled; expected eager mode, it is no registered op. Leave fuse_base off."
        )
    if weight.shape != (outputs, x.shape[-1]) or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} and bias {None if bias is None else tuple(bias.shape)}; expected "
            f"{(outputs, x.shape[-1])} and its first side. Pass the base layer's own."
        )
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError(
            "weight or bias requires grad; expected both frozen, for they get no gradient here. Call requires_grad_("
            "False), or leave fuse_base off."
        )
    if not torch.is_grad_enabled():
        return _run(call, weight, bias)[0]
    y: Tensor = _FusedLinear.apply(call, weight, bias, x, call.gate, *call.lora_a, *call.lora_b)  # type: ignore[no-untyped-call]
    return y


_forward = triton_backend.kernel("fused_base", "fused_base_forward")


def _run(call: LoraCall, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """y and S."""
    assert call.x is not None
    with without_autocast(call.x.device.type):
        output: tuple[Tensor, Tensor] = _forward(call, weight, bias)
    return output


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: LoraCall, weight: Tensor, bias: Tensor | None, x: Tensor, gate: Tensor, *experts: Tensor
    ) -> Tensor:
        y, shrunk = _run(call, weight, bias)
        ctx.saved = Saved(ctx, call, shrunk, "triton")
        ctx.weight = weight
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dgate, experts = ctx.saved.gradients(ctx, grad)
        if dx is not None:
            dx += grad @ ctx.weight.to(grad.dtype)
        return None, None, None, dx, dgate, *experts
