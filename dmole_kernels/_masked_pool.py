# SPDX-License-Identifier: Apache-2.0
"""
    pooled[b, d] = max over t with mask[b, t] of hidden[b, t, d]

Max-pooling without padding, so that a sample's feature does not depend on the rest of the batch (the router feature of
D-MoLE, arXiv 2506.11672 section 3.3; the public code pools over padding too).

Shape letters: B samples, T tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dmole_kernels import reference, triton_backend
from dmole_kernels._argument_checks import check_floating, check_one_device
from dmole_kernels._backend import BACKENDS, Op
from dmole_kernels._registration import refuse_transforms, register_op


def masked_max_pool(hidden: Tensor, mask: Tensor, *, backend: str = "auto") -> Tensor:
    """[B, D] maxima of hidden [B, T, D] over the tokens with mask [B, T] True (or non-zero).

    Differentiable in hidden: each maximum's gradient goes to the first token that reaches it.

    Raises:
        ValueError: for shapes, dtypes or devices that do not match, or a sample whose tokens are all masked (under
            torch.compile, where values cannot be checked, its row is -inf).
        NotImplementedError: under a torch.func transform or in forward-mode differentiation.
    """
    if hidden.dim() != 3 or mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and mask {tuple(mask.shape)}; expected [samples, tokens, "
            f"features] and [samples, tokens]. Pass the attention mask of the same tokens."
        )
    check_floating(hidden=hidden)
    check_one_device(hidden=hidden, mask=mask)
    refuse_transforms("masked_max_pool")
    if not torch.compiler.is_compiling():
        empty = (~(mask != 0).any(1)).nonzero().flatten().tolist() if hidden.shape[1] else list(range(hidden.shape[0]))
        if empty:
            raise ValueError(
                f"mask hides every token of samples {empty[:8]}; expected at least one. Drop those samples."
            )
    pooled: Tensor
    pooled, _ = _OP(hidden, mask != 0, MASKED_MAX_POOL.pick(backend, hidden.device.type, hidden.dtype))
    return pooled


POOL: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {"reference": reference.masked_max_pool}
if "cpu" in BACKENDS:
    POOL["cpu"] = torch.ops.dmole_kernels.cpu_masked_max_pool
if "triton" in BACKENDS:
    POOL["triton"] = triton_backend.kernel("router_score", "masked_max_pool")
MASKED_MAX_POOL = Op("masked_max_pool", POOL)


def _pool(hidden: Tensor, mask: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return POOL[backend](hidden, mask)


def _pool_fake(hidden: Tensor, mask: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    shape = (hidden.shape[0], hidden.shape[2])
    return hidden.new_empty(shape), hidden.new_empty(shape, dtype=torch.int64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.tokens = inputs[0].shape[1]
    ctx.save_for_backward(output[1])


def _autograd(ctx: Any, grad_BD: Tensor, _grad_token: Tensor) -> tuple[Tensor, None, None]:
    (token_BD,) = ctx.saved_tensors
    grad_hidden_BTD = grad_BD.new_zeros((grad_BD.shape[0], ctx.tokens, grad_BD.shape[1]))
    return grad_hidden_BTD.scatter(1, token_BD[:, None], grad_BD[:, None]), None, None


_OP = register_op(
    "masked_max_pool(Tensor hidden, Tensor mask, str backend) -> (Tensor, Tensor)",
    kernel=_pool,
    fake=_pool_fake,
    backward=_autograd,
    setup_context=_setup_context,
)
