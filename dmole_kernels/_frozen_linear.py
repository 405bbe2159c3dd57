# SPDX-License-Identifier: Apache-2.0
"""
    y = x W^T + b,    dx = dy W          for a frozen weight

The base product. PyTorch's BLAS computes it, except where the "cpu" backend was measured faster (`cpu.takes_linear`);
there sums are float32 and rounded once, and the bits of a row of y do not depend on the number of threads, nor on the
other rows as long as their number selects the same form of the kernel (`csrc/cpu/per_isa/frozen_linear.h`).

Shape letters: N rows (all leading dimensions), D in_features, P out_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dmole_kernels import cpu
from dmole_kernels._backend import BackendChoice, Op
from dmole_kernels._registration import refuse_transforms, register_op


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """y [..., P] for x [..., D], weight [P, D] and bias [P]; differentiable in x alone.

    As `F.linear`, under autocast too (the cpu kernel rounds the weight as it reads it: no cast copy).

    Raises:
        ValueError: for a weight or bias that requires grad, dtypes or shapes that differ, an unavailable backend.
        NotImplementedError: under a torch.func transform or in forward-mode differentiation.
    """
    refuse_transforms("frozen_linear")
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    _check(x, weight, bias, autocast)
    if autocast:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    # The compiler fuses F.linear; under torch.compile the kernels run only when requested by name.
    requested = "reference" if backend == "auto" and torch.compiler.is_compiling() else backend
    if FROZEN_LINEAR.pick_for(requested, x, weight) == "reference":
        return F.linear(x, weight, bias)
    return own_linear(x, weight, bias)


def own_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product of the cpu backend, for checked arguments."""
    y: Tensor
    if torch.is_grad_enabled() and x.requires_grad:
        y = torch.ops.dmole_kernels.frozen_linear(x, weight, bias)
    else:
        y = torch.ops.dmole_kernels.cpu_frozen_linear.default(x, weight, bias)
    return y


class _FrozenLinear(Op):
    """By default the choice depends on the shapes: the kernels of the cpu backend where they were measured faster, else
    PyTorch's."""

    def pick_for(self, requested: str, x: Tensor, weight: Tensor) -> str:
        name = self.pick(requested, x.device.type, x.dtype)
        if name == "cpu" and self.asked(requested) == "auto" and not own_is_faster(x, weight):
            return "reference"
        return name

    def choose(self, requested: str, device_type: str, dtype: torch.dtype | None) -> BackendChoice:
        choice = super().choose(requested, device_type, dtype)
        if self.asked(requested) != "auto" or choice.name == "reference":
            return choice
        return BackendChoice(name="reference", reason=f"or 'cpu', by shape: {cpu.explain_linear()}")


def own_is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether the cpu backend was measured faster than PyTorch's BLAS on these shapes."""
    return weight.dtype in cpu.DTYPES and cpu.takes_linear(
        math.prod(x.shape[:-1]), weight.shape[1], x.dtype, transposed=weight.stride(1) != 1
    )


class FrozenLinears(TorchFunctionMode):
    """Inside the block `frozen_linear` replaces every `F.linear`, and so every `nn.Linear`, whose weight and bias are
    frozen. For passes over a frozen model, such as features and gradient norms.

        with FrozenLinears(), torch.no_grad():
            model(**batch)
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Under use_backend("triton"), say, PyTorch computes the products: that backend has no kernel for them.
        if func is F.linear and not kwargs and is_frozen(*args) and FROZEN_LINEAR.asked("auto") in ("auto", *KERNELS):
            return frozen_linear(*args)
        return func(*args, **(kwargs or {}))


def is_frozen(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `frozen_linear` accepts these arguments of `F.linear`: a frozen weight and bias, and matching dtypes."""
    same = weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
    return not _trains(weight, bias) and weight.dim() == 2 and same


def _trains(weight: Tensor, bias: Tensor | None) -> bool:
    return weight.requires_grad or (bias is not None and bias.requires_grad)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, autocast: bool) -> None:
    if _trains(weight, bias):
        raise ValueError("weight or bias requires grad; expected a frozen layer. Freeze it, or call F.linear.")
    if weight.dim() != 2 or weight.shape[1:] != x.shape[-1:] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}, bias "
            f"{None if bias is None else tuple(bias.shape)}; expected [..., in], [out, in] and [out]. Transpose or "
            f"flatten one of them."
        )
    if weight.dtype != x.dtype and not autocast:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}; expected one dtype. Cast one, or use autocast.")


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.dmole_kernels.cpu_frozen_linear(x, weight, bias)
    return y


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (weight,) = ctx.saved_tensors
    # Backward runs outside autocast: the weight is rounded here as in forward.
    if own_is_faster(grad, weight.t()):
        return torch.ops.dmole_kernels.frozen_linear(grad, weight.t(), None), None, None
    return grad @ weight.to(grad.dtype), None, None


KERNELS: dict[str, Callable[..., Tensor]] = {"reference": F.linear}
FROZEN_LINEAR = _FrozenLinear("frozen_linear", KERNELS)
if cpu.EXTENSION is not None:
    KERNELS["cpu"] = _forward
    register_op(
        "frozen_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
        kernel=_forward,
        fake=_fake,
        backward=_autograd,
        setup_context=_setup_context,
    )
