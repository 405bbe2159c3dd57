# SPDX-License-Identifier: Apache-2.0
"""What `GradNormRecorder` puts into a model for the time of its block: a tap on each layer, an eye on their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Tap(torch.autograd.Function):
    """Identity that shows (input, output gradient) of a layer to `record`, and starts a graph where none exists."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, switch: Tensor, record: Callable[[Tensor, Tensor, int], None]
    ) -> Tensor:
        # In place, so that the output is not a view: models may go on with in-place operations.
        ctx.mark_dirty(output)
        # Saved, not kept: a model that changes x in place after the layer read it is noticed by autograd.
        ctx.save_for_backward(x)
        ctx.record = record
        # A recomputation by a reentrant checkpoint belongs to the backward that it runs in.
        ctx.task = current_task()
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.record(x, grad, current_task() if ctx.task == NO_TASK else ctx.task)
        return grad if ctx.needs_input_grad[0] else None, None, None, None


NO_TASK = -1


def current_task() -> int:
    """The number of the backward call that runs here, or NO_TASK."""
    return int(torch._C._current_graph_task_id())


# What reads a weight without multiplying with it.
_METADATA = {"__get__", "size", "dim", "numel", "stride", "detach", "data_ptr", "is_floating_point", "requires_grad_"}


class WeightReads(TorchFunctionMode):
    """Notes the names of the layers whose weight some function reads outside the layer's own forward."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names  # by id of the weight
        self.inside: list[str] = []
        self.noticed: dict[str, str] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for argument in args:
            name = self.names.get(id(argument))
            if name is not None and name not in self.inside:
                called = getattr(func, "__name__", str(func))
                if called not in _METADATA:
                    self.noticed.setdefault(name, called)
        return func(*args, **(kwargs or {}))
