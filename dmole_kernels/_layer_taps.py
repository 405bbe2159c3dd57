# SPDX-License-Identifier: Apache-2.0
"""Inputs and output gradients of linears, during ordinary forward and backward calls."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dmole_kernels._backward_pass import BackwardPass
from dmole_kernels._parameter_reads import ParameterReads

# (name, x [samples, tokens, in_features], grad [samples, tokens, out_features], whether the running backward call may
# reach the layer again)
OnGradient = Callable[[str, Tensor, Tensor, bool], None]


class _Call:
    """One forward call of a layer. Lives as long as its node in the graph."""

    __slots__ = ("__weakref__", "mask", "name", "recomputed")

    def __init__(self, name: str, mask: Tensor | None, recomputed: bool) -> None:
        self.name = name
        self.mask = mask
        self.recomputed = recomputed


class _Tap(torch.autograd.Function):
    """Identity that passes (input, output gradient) of a layer to `record`, and starts a graph where there is none."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        x: Tensor,
        switch: Tensor,
        call: _Call,
        record: Callable[[_Call, Tensor, Tensor], None],
    ) -> Tensor:
        # In place, so that the output is not a view: models may modify it in place.
        ctx.mark_dirty(output)
        ctx.save_for_backward(x)
        ctx.call = call
        ctx.record = record
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        try:
            (x,) = ctx.saved_tensors
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise ValueError(
                f"the input of {ctx.call.name!r} was modified in place after the call; expected it unchanged until "
                f"backward, which computes the weight gradient from it. Use an out-of-place operation there."
            ) from error
        ctx.record(ctx.call, x, grad)
        return grad if ctx.needs_input_grad[0] else None, None, None, None, None


class LayerTaps:
    """Hooks on `linears`, from `install` to `remove`.

    Args:
        linears: the layers by name.
        mask_of: gives the mask of a layer by name at its forward call, None without one.
        backward: told of every backward call that reaches a layer, before `on_gradient`.
        on_gradient: called once for each backward call through each forward call. Masked tokens are zero.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        *,
        mask_of: Callable[[str], Tensor | None],
        backward: BackwardPass,
        on_gradient: OnGradient,
    ) -> None:
        self.linears = linears
        self.forward_calls = dict.fromkeys(linears, 0)
        # Masks of calls with gradients disabled, each of which a reentrant checkpoint may repeat in backward.
        self.unrecorded: dict[str, list[Tensor | None]] = {name: [] for name in linears}
        self._mask_of = mask_of
        self._backward = backward
        self._on_gradient = on_gradient
        # Calls whose backward is still to come.
        self._open: dict[str, weakref.WeakSet[_Call]] = {name: weakref.WeakSet() for name in linears}
        # A reentrant checkpoint is recomputed once more for each backward call that keeps the graph.
        self._graph_was_kept = False
        self.installed = False
        self._handles: list[RemovableHandle] = []
        self._running: set[str] = set()
        self._reads = ParameterReads(linears, self._running)

    def install(self) -> None:
        for name, linear in self.linears.items():
            self._handles.append(linear.register_forward_pre_hook(self._pre_hook(name)))
            # First of all hooks: the others may replace the output.
            hook = self._forward_hook(name)
            self._handles.append(linear.register_forward_hook(hook, prepend=True, with_kwargs=True))
        self._reads.__enter__()  # type: ignore[no-untyped-call]
        self.installed = True

    def remove(self) -> None:
        self.installed = False
        self._reads.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._running.clear()

    def _pre_hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, inputs: self._running.add(name)

    def _forward_hook(self, name: str) -> Callable[..., Tensor | None]:
        switch = torch.zeros((), requires_grad=True)

        def hook(
            module: nn.Module, inputs: tuple[Tensor, ...], keywords: Mapping[str, Tensor], output: Tensor
        ) -> Tensor | None:
            self._running.discard(name)
            mask = self._mask_of(name)
            recomputed = torch._C._current_graph_task_id() != -1
            if recomputed:
                # Also where gradients are disabled, so that an outer reentrant checkpoint is known to its inner ones.
                self._backward.enter()
                self._graph_was_kept |= torch._C._autograd._get_current_graph_task_keep_graph()
            if not torch.is_grad_enabled():
                if not recomputed:
                    self.unrecorded[name].append(mask)
                return None
            if recomputed and mask is None:
                mask = self._mask_before_recomputation(name)
            x = inputs[0] if inputs else keywords["input"]
            if mask is not None and (mask.dim() >= x.dim() or x.shape[: mask.dim()] != mask.shape):
                raise ValueError(
                    f"mask has shape {tuple(mask.shape)} but the input of {name!r} is {tuple(x.shape)}; expected the "
                    f"same [batch, tokens]. Name the layers the mask is for: recorder.mask(mask, names=[...])."
                )
            call = _Call(name, mask, recomputed)
            if not recomputed:
                self.forward_calls[name] += 1
                self._open[name].add(call)
            tapped: Tensor = _Tap.apply(output, x.detach(), switch, call, self._record)  # type: ignore[no-untyped-call]
            return tapped

        return hook

    def _mask_before_recomputation(self, name: str) -> Tensor | None:
        """The mask that a reentrant checkpoint's call had in forward; that block may have ended since."""
        masks = self.unrecorded[name]
        if any(mask is not masks[0] for mask in masks):
            raise ValueError(
                f"{name!r} is recomputed in backward and had different masks in forward; expected one. Call backward "
                f"inside the `mask` block, or checkpoint with use_reentrant=False."
            )
        return masks[0] if masks else None

    @torch.no_grad()
    def _record(self, call: _Call, x: Tensor, grad: Tensor) -> None:
        if not self.installed:
            return
        self._backward.enter()
        grad = grad.detach()
        # Under autocast the layer multiplied with x rounded to the dtype of its output.
        x = x.to(grad.dtype)
        if call.mask is not None:
            # Selected, not multiplied: 0 * NaN is NaN.
            x, grad = (_masked(tensor, call.mask.to(grad.device)) for tensor in (x, grad))
        self._on_gradient(call.name, _by_sample(x), _by_sample(grad), self._more_may_follow(call))

    def _more_may_follow(self, call: _Call) -> bool:
        """Whether the running backward call may reach the layer again. True where it cannot be known."""
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self._open[call.name].discard(call)
        unrecorded = self.unrecorded[call.name]
        unknown = call.recomputed and (self._graph_was_kept or not unrecorded)
        if call.recomputed:
            self.forward_calls[call.name] += 1
            if unrecorded:
                place = next((i for i, mask in enumerate(unrecorded) if mask is call.mask), 0)
                del unrecorded[place]
        return unknown or bool(unrecorded) or len(self._open[call.name]) > 0


def _by_sample(tensor: Tensor) -> Tensor:
    """[samples, tokens, features]; explicit sizes, since an empty batch leaves -1 undefined."""
    if tensor.dim() == 1:
        return tensor.reshape(1, 1, -1)
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:-1]), tensor.shape[-1])


def _masked(tensor: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.reshape(*mask.shape, *[1] * (tensor.dim() - mask.dim())), tensor, 0)
