# SPDX-License-Identifier: Apache-2.0
"""
    y = x W^T + b,    dx = dy W          for a weight that does not learn

The product beside the experts. PyTorch's BLAS makes it, except where the "cpu" backend was measured faster
(`cpu.takes_linear`); there sums are float32 and rounded once, a row of y has the same bits with any number of threads,
and beside any other rows while their number leaves the kernel's form alone (`csrc/cpu/per_isa/frozen_linear.h`).

Shape letters: N rows (all leading dimensions), D in_features, P out_features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dmole_kernels import cpu
from dmole_kernels._backend import choose_backend
from dmole_kernels._registration import register_op
from dmole_kernels._transforms import values_are_hidden


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """y [..., P] for x [..., D], weight [P, D] and bias [P]; differentiable in x alone.

    As `F.linear`, under autocast too (the own kernel rounds the weight as it reads it: no cast copy).

    Raises:
        ValueError: for a weight or bias that requires grad, dtypes or shapes that differ, a backend that is not there.
    """
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    _check(x, weight, bias, autocast)
    if autocast:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    choice = choose_backend(backend, x.device.type, x.dtype)
    if choice.name != "cpu" or values_are_hidden() or not _takes(x, weight):
        return F.linear(x, weight, bias)
    y: Tensor
    if torch.is_grad_enabled() and x.requires_grad:
        y = torch.ops.dmole_kernels.frozen_linear(x, weight, bias)
    else:
        y = torch.ops.dmole_kernels.cpu_frozen_linear.default(x, weight, bias)
    return y


class FrozenLinears(TorchFunctionMode):
    """Inside the block every `F.linear`, and so every `nn.Linear`, whose weight and bias do not learn goes through
    `frozen_linear`; all else is as before. For passes over a frozen model, such as features and gradient norms.

        with FrozenLinears(), torch.no_grad():
            model(**batch)
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and is_frozen(*args):
            return frozen_linear(*args)
        return func(*args, **(kwargs or {}))


def is_frozen(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `frozen_linear` takes what `F.linear` would: weight and bias do not learn, and dtypes go together."""
    same = weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
    return not _learns(weight, bias) and weight.dim() == 2 and same


def _learns(weight: Tensor, bias: Tensor | None) -> bool:
    return weight.requires_grad or (bias is not None and bias.requires_grad)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, autocast: bool) -> None:
    if _learns(weight, bias):
        raise ValueError("weight or bias requires grad; expected a frozen layer. Freeze it, or call F.linear.")
    if weight.dim() != 2 or weight.shape[1:] != x.shape[-1:] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}, bias "
            f"{None if bias is None else tuple(bias.shape)}; expected [..., in], [out, in] and [out]. Transpose or "
            f"flatten one of them."
        )
    if weight.dtype != x.dtype and not autocast:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}; expected one dtype. Cast one, or use autocast.")


def _takes(x: Tensor, weight: Tensor) -> bool:
    return weight.dtype in cpu.DTYPES and cpu.takes_linear(
        x.shape[:-1].numel(), weight.shape[1], x.dtype, transposed=weight.stride(1) != 1
    )


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.dmole_kernels.cpu_frozen_linear(x, weight, bias)
    return y


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (weight,) = ctx.saved_tensors
    # Backward runs outside autocast: the weight is rounded here as it was on the way forward.
    if _takes(grad, weight.t()):
        return torch.ops.dmole_kernels.frozen_linear(grad, weight.t(), None), None, None
    return grad @ weight.to(grad.dtype), None, None


if cpu.EXTENSION is not None:
    register_op(
        "frozen_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
        kernel=_forward,
        fake=_fake,
        backward=_autograd,
        setup_context=_setup_context,
    )
