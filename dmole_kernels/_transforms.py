# SPDX-License-Identifier: Apache-2.0
"""
    transformable(op)(*arguments) = op(*arguments)        under torch.func and in forward mode, too

torch.library's derivative formulas serve plain autograd alone: torch.func.grad refuses them, and forward mode passes
them by with a tangent of zero, silently (torch 2.13). Here the same formulas, with one for tangents, make an
autograd.Function that torch.func knows: grad, vjp, jacrev, jvp, jacfwd, vmap and their compositions, but no second
derivatives. vmap is a loop over the mapped dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

Formula = Callable[..., Any]


def transforms_active() -> bool:
    """Whether a torch.func transform or a forward-mode level is open."""
    if torch._C._are_functorch_transforms_active():
        return True
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def values_are_hidden() -> bool:
    """Whether tensors here may stand for many or for unknown values, so that none can be looked at."""
    return torch.compiler.is_compiling() or transforms_active()


def transformable(
    op: Callable[..., Any], backward: Formula | None, setup_context: Formula | None, jvp: Formula | None
) -> Callable[..., Any]:
    """`op` as a function of the same arguments whose derivatives torch.func finds.

    Args:
        backward, setup_context: as torch.library.register_autograd takes them.
        jvp: (arguments, tangents, output) -> tangents of the output; None for a tangent of zero.
    """
    name = str(op)

    class Transformable(torch.autograd.Function):
        @staticmethod
        def forward(call: _Call, *tensors: Tensor) -> Any:
            return op(*call.arguments(tensors))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.call, *tensors = inputs
            if setup_context is not None:
                setup_context(ctx, ctx.call.arguments(tensors), output)
            ctx.several = isinstance(output, tuple)
            ctx.save_for_forward(*tensors, *(output if ctx.several else (output,)))

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            if backward is None:
                raise _no_formula(name, "derivative")
            # One gradient an argument: a list of them for a list of tensors, None for what is no tensor.
            found = backward(ctx, *grads)
            return None, *(
                grad
                for count, of_argument in zip(ctx.call.counts, found, strict=True)
                for grad in ((of_argument if isinstance(of_argument, list) else [of_argument]) if count else [])
            )

        @staticmethod
        def jvp(ctx: Any, _call: None, *tangents: Tensor | None) -> Any:
            if jvp is None:
                raise _no_formula(name, "forward-mode derivative")
            tensors, outputs = ctx.saved_tensors[: len(tangents)], ctx.saved_tensors[len(tangents) :]
            output = outputs if ctx.several else outputs[0]
            return jvp(ctx.call.arguments(tensors), ctx.call.arguments(tangents), output)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], call: _Call, *tensors: Tensor) -> tuple[Any, Any]:
            results = []
            for i in range(info.batch_size):
                chosen = (t if dim is None else t.select(dim, i) for t, dim in zip(tensors, in_dims[1:], strict=True))
                results.append(Transformable.apply(call, *chosen))  # type: ignore[no-untyped-call]
            if isinstance(results[0], Tensor):
                return torch.stack(results), 0
            stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
            return stacked, (0,) * len(stacked)

    def run(*arguments: Any) -> Any:
        if not transforms_active():
            return op(*arguments)
        if torch.compiler.is_compiling():
            # Ends the graph here: the transform then runs uncompiled. Without this its tangents would be zeros.
            raise NotImplementedError(
                f"{name} is under a torch.func transform inside torch.compile(fullgraph=True); expected one without "
                f"the other. Compile what is inside the transform, or drop fullgraph."
            )
        call = _Call(arguments)
        return Transformable.apply(call, *call.tensors)  # type: ignore[no-untyped-call]

    return run


class _Call:
    """An op's arguments with their tensors taken out: torch.func follows the tensors it is handed one by one."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        leaves, self.layout = pytree.tree_flatten(arguments)
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.constants = [_PLACE if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.counts = [sum(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(part)) for part in arguments]

    def arguments(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments with other tensors (or tangents, or gradients) in their places."""
        waiting = iter(tensors)
        leaves = [next(waiting) if constant is _PLACE else constant for constant in self.constants]
        arguments: tuple[Any, ...] = pytree.tree_unflatten(leaves, self.layout)
        return arguments


_PLACE = object()


def _no_formula(name: str, what: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name} has no {what}; expected first derivatives of the public ops only. Write the formula in plain PyTorch "
        f"where you need more."
    )
