# SPDX-License-Identifier: Apache-2.0
"""Weight-gradient norms of chosen linears during ordinary backward calls, with every parameter frozen.

A forward hook keeps the layer's input; when backward reaches the layer's output, the gradient there and that input give
the norm (`grad_norm`). No other layer's weight gradient is ever computed, and no parameter's `.grad` is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dmole_kernels._grad_norm import (
    accumulate_gradient,
    accumulate_sketch,
    grad_norm_per_batch,
    grad_norm_per_sample,
    sketch_relative_std,
)

Quantity = Literal["accumulated", "per_batch", "per_sample"]
Method = Literal["auto", "exact", "sketch", "direct", "ghost"]
METHODS: dict[str, tuple[str, ...]] = {
    "accumulated": ("auto", "exact", "sketch"),
    "per_batch": ("auto", "direct", "ghost"),
    "per_sample": ("auto", "direct", "ghost"),
}


@dataclass(frozen=True, kw_only=True)
class GradNorm:
    """Norms of one linear's gradient.

    `weight` and `bias` (0.0 for a layer without one) are the norms of the accumulated gradient, or the means of
    `weight_values` and `bias_values`, which hold one norm per batch or per sample (empty when accumulated).
    `relative_std` is the sketch's estimated relative standard deviation, 0.0 where the norm is exact; `calls` counts
    the backward passes through the layer: 0 means that no gradient reached it.
    """

    weight: float
    bias: float
    calls: int
    relative_std: float
    weight_values: Tensor
    bias_values: Tensor


class _Tap(torch.autograd.Function):
    """Identity that shows (input, output gradient) of a layer to `record`, and starts a graph where none exists."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, switch: Tensor, record: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        # In place, so that the output is not a view: models may go on with in-place operations.
        ctx.mark_dirty(output)
        ctx.save_for_backward(x)
        ctx.record = record
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.record(x, grad)
        return grad if ctx.needs_input_grad[0] else None, None, None, None


class GradNormRecorder:
    """Context manager; `norms()` after (or inside) it.

        with GradNormRecorder({"q_proj": layer.q_proj}) as recorder:
            model(**batch).loss.backward()
        recorder.norms()["q_proj"].weight

    Args:
        linears: the layers by name. A weight under two names is an error: its gradient is the sum over both.
        quantity: "accumulated" (norm of the sum over all backward calls in the block: D-MoLE's score), "per_batch" (one
            norm a backward call) or "per_sample" (one norm for each index of the input's first dimension).
        method: accumulated: "exact" (a float32 buffer of the weight's size for each layer) or "sketch" (sketch_size^2,
            an unbiased estimate of the squared norm, see GradNorm.relative_std); else "direct" or "ghost". "auto" is
            exact for accumulated, fewer flops for the others.
        sketch_size: side of the sketch; the relative error falls as its square root.
        generator: draws the sketch matrices; None uses one with a fixed seed, the same on every process, as adding
            sketches over processes needs.
        backend: see `choose_backend`.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        *,
        quantity: Quantity = "accumulated",
        method: Method = "auto",
        sketch_size: int = 64,
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> None:
        if quantity not in METHODS:
            raise ValueError(f"quantity={quantity!r}; expected one of {', '.join(METHODS)}. D-MoLE's is 'accumulated'.")
        if method not in METHODS[quantity]:
            raise ValueError(
                f"method={method!r} for quantity={quantity!r}; expected one of {', '.join(METHODS[quantity])}. "
                f"Use 'auto'."
            )
        if sketch_size < 1:
            raise ValueError(f"sketch_size={sketch_size}; expected at least 1. Use 64.")
        owners: dict[int, str] = {}
        for name, linear in linears.items():
            first = owners.setdefault(id(linear.weight), name)
            if first != name:
                raise ValueError(
                    f"linears {first!r} and {name!r} share one weight; expected distinct weights. Leave one of them "
                    f"out: a tied weight's gradient is the sum over both places, which neither alone has."
                )
        self.linears = dict(linears)
        self.quantity = quantity
        self.method = method
        self.sketch_size = sketch_size
        self.backend = backend
        self._left: dict[int, Tensor] = {}
        self._right: dict[int, Tensor] = {}
        if method == "sketch":
            drawing = generator if generator is not None else torch.Generator().manual_seed(0)
            for linear in linears.values():
                _sketch_side(self._left, linear.out_features, sketch_size, linear, drawing)
                _sketch_side(self._right, linear.in_features, sketch_size, linear, drawing)
        self._weight_sums: dict[str, Tensor] = {}
        self._bias_sums: dict[str, Tensor] = {}
        self._weight_values: dict[str, list[Tensor]] = {name: [] for name in linears}
        self._bias_values: dict[str, list[Tensor]] = {name: [] for name in linears}
        self._calls = dict.fromkeys(linears, 0)
        self._masks: list[tuple[Tensor, frozenset[str]]] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> GradNormRecorder:
        if self._handles:
            raise ValueError(
                "this GradNormRecorder is already recording; expected one `with` at a time. Leave it first."
            )
        for name, linear in self.linears.items():
            self._handles.append(linear.register_forward_hook(self._forward_hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def mask(self, mask_BT: Tensor, names: Collection[str] | None = None) -> Iterator[None]:
        """Ignores the tokens with mask False (padding) in the layers called `names` (all when None) during the block.

        Masks are read in forward. A masked layer's input must be [B, T, ...].
        """
        chosen = frozenset(self.linears if names is None else names)
        unknown = chosen - set(self.linears)
        if unknown:
            raise ValueError(f"names has {sorted(unknown)}; expected some of {list(self.linears)}. Check the spelling.")
        self._masks.append((mask_BT, chosen))
        try:
            yield
        finally:
            self._masks.pop()

    def _forward_hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        switch = torch.zeros((), requires_grad=True)

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            mask = next((mask for mask, names in reversed(self._masks) if name in names), None)
            x = inputs[0]
            if mask is not None and x.shape[:2] != mask.shape:
                raise ValueError(
                    f"mask has shape {tuple(mask.shape)} but the input of {name!r} is {tuple(x.shape)}; expected the "
                    f"same [batch, tokens]. Name the layers the mask is for: recorder.mask(mask, names=[...])."
                )
            tapped: Tensor = _Tap.apply(  # type: ignore[no-untyped-call]
                output, x.detach(), switch, lambda x, grad: self._record(name, mask, x, grad)
            )
            return tapped

        return hook

    @torch.no_grad()
    def _record(self, name: str, mask: Tensor | None, x: Tensor, grad: Tensor) -> None:
        if not self._handles:
            return
        self._calls[name] += 1
        if mask is not None:
            grad = grad * mask.to(grad.dtype).reshape(*mask.shape, *[1] * (grad.dim() - 2))
        has_bias = self.linears[name].bias is not None
        wide = torch.promote_types(grad.dtype, torch.float32)
        x_ND, grad_NP = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        if self.quantity == "accumulated":
            if has_bias:
                column_sum_P = grad_NP.to(wide).sum(0)
                self._bias_sums[name] = (
                    self._bias_sums[name] + column_sum_P if name in self._bias_sums else column_sum_P
                )
            if name not in self._weight_sums:
                shape = self._sum_shape(self.linears[name])
                self._weight_sums[name] = torch.zeros(shape, dtype=wide, device=grad.device)
            total = self._weight_sums[name]
            if self.method == "sketch":
                left, right = self._left[grad_NP.shape[1]].to(wide), self._right[x_ND.shape[1]].to(wide)
                accumulate_sketch(total, x_ND, grad_NP, left, right, backend=self.backend)
            else:
                accumulate_gradient(total, x_ND, grad_NP, backend=self.backend)
            return
        method: Any = self.method
        if self.quantity == "per_batch":
            self._weight_values[name].append(
                grad_norm_per_batch(x_ND, grad_NP, method=method, backend=self.backend)[None]
            )
            if has_bias:
                self._bias_values[name].append(grad_NP.to(wide).sum(0).norm()[None])
            return
        x_BTD, grad_BTP = (tensor.reshape(x.shape[0], -1, tensor.shape[-1]) for tensor in (x, grad))
        self._weight_values[name].append(grad_norm_per_sample(x_BTD, grad_BTP, method=method, backend=self.backend))
        if has_bias:
            self._bias_values[name].append(grad_BTP.to(wide).sum(1).norm(dim=1))

    def norms(self) -> dict[str, GradNorm]:
        """The norms so far, one entry for each linear, in the order they were given."""
        return {name: self._norm(name) for name in self.linears}

    def _norm(self, name: str) -> GradNorm:
        nothing = torch.zeros(0)
        if self.quantity == "accumulated":
            total, bias = self._weight_sums.get(name, nothing), self._bias_sums.get(name, nothing)
            return GradNorm(
                weight=float(total.norm()),
                bias=float(bias.norm()),
                calls=self._calls[name],
                relative_std=sketch_relative_std(total) if self.method == "sketch" and total.numel() else 0.0,
                weight_values=nothing,
                bias_values=nothing,
            )
        weights = torch.cat(self._weight_values[name]) if self._weight_values[name] else nothing
        biases = torch.cat(self._bias_values[name]) if self._bias_values[name] else nothing
        return GradNorm(
            weight=float(weights.mean()) if weights.numel() else 0.0,
            bias=float(biases.mean()) if biases.numel() else 0.0,
            calls=self._calls[name],
            relative_std=0.0,
            weight_values=weights,
            bias_values=biases,
        )

    def reduce_(self, all_reduce: Callable[[Tensor], object] | None = None) -> None:
        """Sums the accumulated buffers over processes, in place, layer by layer in the order they were given.

        `all_reduce(tensor)` must sum in place; None takes torch.distributed's. Every process calls it, with the same
        linears, also where a layer saw no batch.
        """
        if self.quantity != "accumulated":
            raise ValueError(
                f"reduce_ got quantity={self.quantity!r}; expected 'accumulated', the only one that adds up. Gather "
                f"the weight_values of norms() instead."
            )
        reduce = all_reduce if all_reduce is not None else torch.distributed.all_reduce
        for name, linear in self.linears.items():
            wide = torch.promote_types(linear.weight.dtype, torch.float32)
            for sums, shape in (
                (self._weight_sums, self._sum_shape(linear)),
                (self._bias_sums, (linear.out_features if linear.bias is not None else 0,)),
            ):
                if name not in sums:
                    sums[name] = torch.zeros(shape, dtype=wide, device=linear.weight.device)
                if sums[name].numel():
                    reduce(sums[name])

    def _sum_shape(self, linear: nn.Linear) -> tuple[int, int]:
        sketched = self.method == "sketch"
        return (self.sketch_size, self.sketch_size) if sketched else (linear.out_features, linear.in_features)


def _sketch_side(
    sides: dict[int, Tensor], width: int, size: int, linear: nn.Linear, generator: torch.Generator
) -> None:
    """N(0, 1/size) as [width, size], one for all layers of this width: each layer's estimate is unbiased by itself."""
    if width not in sides:
        drawn = torch.randn(width, size, generator=generator) / math.sqrt(size)
        sides[width] = drawn.to(linear.weight.device, torch.promote_types(linear.weight.dtype, torch.float32))
