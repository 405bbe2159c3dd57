# SPDX-License-Identifier: Apache-2.0
"""Weight-gradient norms of chosen linears during ordinary backward calls, with every parameter frozen.

A forward hook keeps the input of the layer. When backward reaches the output of the layer, the gradient there and the
input give the norm (`_grad_norm`). No other weight gradient is computed, and no `.grad` of a parameter is allocated.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmole_kernels._argument_checks import dtype_name
from dmole_kernels._backward_pass import BackwardPass
from dmole_kernels._grad_norm import (
    accumulate_gradient,
    accumulate_sketch,
    grad_norm_per_batch,
    grad_norm_per_sample,
    sketch_relative_std,
)
from dmole_kernels._layer_taps import LayerTaps
from dmole_kernels._parameter_reads import check_not_shared

Quantity = Literal["accumulated", "per_batch", "per_sample"]
Method = Literal["auto", "exact", "sketch", "direct", "ghost"]
METHODS: dict[str, tuple[str, ...]] = {
    "accumulated": ("auto", "exact", "sketch"),
    "per_batch": ("auto", "direct", "ghost"),
    "per_sample": ("auto", "direct", "ghost"),
}


@dataclass(frozen=True, kw_only=True)
class GradNorm:
    """Norms of the gradient of one linear.

    Attributes:
        weight: norm of the accumulated weight gradient, or the mean of `weight_values`.
        bias: the same for the bias; 0.0 for a layer without one.
        calls: number of backward calls that reached the layer. 0: it was called, but no gradient reached it.
        forward_calls: number of forward calls with gradients enabled; the recomputation of a checkpoint does not count.
        relative_std: estimated relative standard deviation of a sketch; 0.0 where the norm is exact.
        weight_values: one norm for each backward call or sample, in the order of the calls; empty if accumulated.
        bias_values: the same for the bias.
    """

    weight: float
    bias: float
    calls: int
    forward_calls: int
    relative_std: float
    weight_values: Tensor
    bias_values: Tensor


class GradNormRecorder:
    """Context manager; `norms()` after (or inside) it.

        with GradNormRecorder({"q_proj": layer.q_proj}) as recorder:
            model(**batch).loss.backward()
        recorder.norms()["q_proj"].weight

    The gradient is that of one backward call: for a layer that is called several times, the sum over its calls, as
    autograd would write to `weight.grad`. Two backward calls are two batches. A checkpoint's recomputation counts once.

    Args:
        linears: the layers by name.
        quantity: "accumulated" (norm of the sum over all backward calls in the block: the score of D-MoLE), "per_batch"
            (one norm for each backward call) or "per_sample" (one norm for each index of the first dimension of the
            input; a 1-D input is one sample).
        method: for accumulated, "exact" (a float32 buffer of the size of the weight for each layer) or "sketch"
            (sketch_size^2, an unbiased estimate of the squared norm, see GradNorm.relative_std); for the others,
            "direct" or "ghost". "auto" is exact for accumulated, and the fewer operations for the others.
        sketch_size: rows and columns of the sketch; the relative error is proportional to 1 / sqrt(sketch_size).
        generator: draws the sketch matrices. None uses a fixed seed, the same on every process, so that sketches of
            several processes can be summed.
        backend: see `choose_backend`.
        model: the model of the linears. If given, it is searched for other modules that hold one of their parameters.

    Memory: per_batch and per_sample keep the input and output gradient of a layer until the end of backward only while
    another call of this layer may follow: a second call in the same graph, `retain_graph=True`, or a forward call under
    torch.no_grad, which may be a reentrant checkpoint's.

    Use of a weight or bias outside the forward of its layer is an error, since its gradient would be missing: a
    parameter under two names, in another module of `model`, or as an argument of a PyTorch function in the block, such
    as `F.linear(x, layer.weight)`, in this thread and with gradients enabled. Not noticed: use inside compiled code or
    C++, of a view made before the block, in another thread, and two parameters that share storage.

    Raises:
        ValueError: at construction, for unknown options or a shared parameter. In forward, for use of a parameter
            outside its layer or a mask that does not fit. In backward, for an input that was modified in place, or
            calls of one layer with different numbers of samples (per_sample).

    Source: D-MoLE, arXiv 2506.11672, Eq. 3 (accumulated); arXiv 1510.01799 and 2110.05679 (ghost norms).
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
        model: nn.Module | None = None,
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
        check_not_shared(linears, model)
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
        # Weak: a cycle would keep the buffers until the next garbage collection.
        owner = weakref.proxy(self)
        self._backward = BackwardPass(lambda: owner._finish_backward(), lambda: owner._abandon_backward())
        self._taps = LayerTaps(
            self.linears,
            mask_of=lambda name: owner._mask_of(name),
            backward=self._backward,
            on_gradient=lambda *arguments: owner._record(*arguments),
        )
        # Of the running backward call: (input, output gradient) of calls that others may follow, and finished norms.
        self._parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._new_values: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._reached: set[str] = set()
        self._sums_are_partial = False

    def __enter__(self) -> GradNormRecorder:
        if self._taps.installed:
            raise ValueError(
                "this GradNormRecorder is already recording; expected one `with` at a time. Leave it first."
            )
        self._taps.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._taps.remove()

    @contextmanager
    def mask(self, mask_BT: Tensor, names: Collection[str] | None = None) -> Iterator[None]:
        """Ignores the tokens with mask False (padding) in the layers called `names` (all if None) during the block.

        Args:
            mask_BT: bool, or integers 0 and 1; True keeps the token. Its shape is that of the leading dimensions of the
                input, such as [B, T] for [B, T, in_features]. Inputs and gradients of other tokens may be NaN.
            names: some of the names of `linears`. Where blocks are nested, the innermost one that names a layer counts.

        The mask of a layer is the one at its forward call, wherever backward is called.

        Raises:
            ValueError: for a floating-point mask, such as an additive one, other integers, or unknown names; in forward
                for a mask of another shape than the input.
        """
        if mask_BT.is_floating_point() or mask_BT.is_complex():
            raise ValueError(
                f"mask is {dtype_name(mask_BT.dtype)}; expected bool, or integers 0 and 1. Pass mask == 0 for an "
                f"additive mask, whose zeros are the tokens to keep."
            )
        if mask_BT.dtype != torch.bool and not bool(((mask_BT == 0) | (mask_BT == 1)).all()):
            raise ValueError(
                "mask has integers other than 0 and 1; expected 1 for the tokens to keep. Pass a bool mask."
            )
        chosen = frozenset(self.linears if names is None else names)
        unknown = chosen - set(self.linears)
        if unknown:
            raise ValueError(f"names has {sorted(unknown)}; expected some of {list(self.linears)}. Check the spelling.")
        # A copy: the caller may reuse the tensor before backward.
        self._masks.append((mask_BT.detach().to(torch.bool, copy=True), chosen))
        try:
            yield
        finally:
            self._masks.pop()

    def _mask_of(self, name: str) -> Tensor | None:
        return next((mask for mask, names in reversed(self._masks) if name in names), None)

    def _record(self, name: str, x_BTD: Tensor, grad_BTP: Tensor, more_may_follow: bool) -> None:
        self._reached.add(name)
        if self.quantity == "accumulated":
            self._accumulate(name, x_BTD.flatten(0, 1), grad_BTP.flatten(0, 1))
            return
        self._parts.setdefault(name, []).append((x_BTD, grad_BTP))
        if not more_may_follow:
            self._finish_layer(name)

    def _accumulate(self, name: str, x_ND: Tensor, grad_NP: Tensor) -> None:
        wide = torch.promote_types(grad_NP.dtype, torch.float32)
        if self.linears[name].bias is not None:
            column_sum_P = grad_NP.sum(0, dtype=wide)
            self._bias_sums[name] = self._bias_sums[name] + column_sum_P if name in self._bias_sums else column_sum_P
        if name not in self._weight_sums:
            shape = self._sum_shape(self.linears[name])
            self._weight_sums[name] = torch.zeros(shape, dtype=wide, device=grad_NP.device)
        total = self._weight_sums[name]
        if self.method == "sketch":
            left, right = self._left[grad_NP.shape[1]], self._right[x_ND.shape[1]]
            left, right = (side.to(grad_NP.device, wide) for side in (left, right))
            accumulate_sketch(total, x_ND, grad_NP, left, right, backend=self.backend)
        else:
            accumulate_gradient(total, x_ND, grad_NP, backend=self.backend)

    def _finish_layer(self, name: str) -> None:
        """Norms of the sum over the calls: their tokens follow one another."""
        parts = self._parts.pop(name)
        if self.quantity == "per_batch":
            parts = [(x.reshape(1, -1, x.shape[2]), grad.reshape(1, -1, grad.shape[2])) for x, grad in parts]
        samples = [x.shape[0] for x, _ in parts]
        if len(set(samples)) > 1:
            raise ValueError(
                f"{name!r} was called with {samples} samples in one graph; expected the same number for "
                f"quantity='per_sample', which sums over the calls. Use 'per_batch', or call backward for each."
            )
        x, grad = (torch.cat(side, 1) if len(parts) > 1 else side[0] for side in zip(*parts, strict=True))
        method: Any = self.method
        if self.quantity == "per_batch":
            weight = grad_norm_per_batch(x, grad, method=method, backend=self.backend)[None]
        else:
            weight = grad_norm_per_sample(x, grad, method=method, backend=self.backend)
        bias = None
        if self.linears[name].bias is not None:
            bias = grad.sum(1, dtype=torch.promote_types(grad.dtype, torch.float32)).norm(dim=1)
        self._new_values[name] = weight, bias

    @torch.no_grad()
    def _finish_backward(self) -> None:
        try:
            for name in list(self._parts):
                self._finish_layer(name)
            for name in self._reached:
                self._calls[name] += 1
            for name, (weight, bias) in self._new_values.items():
                self._weight_values[name].append(weight)
                if bias is not None:
                    self._bias_values[name].append(bias)
        finally:
            self._forget_backward()

    def _abandon_backward(self) -> None:
        self._sums_are_partial |= self.quantity == "accumulated" and bool(self._reached)
        self._forget_backward()

    def _forget_backward(self) -> None:
        self._parts.clear()
        self._new_values.clear()
        self._reached.clear()

    def norms(self) -> dict[str, GradNorm]:
        """The norms so far, one entry for each linear, in the order they were given.

        A layer that was called, but that no gradient reached, has norm 0 and `calls` 0.

        Raises:
            ValueError: for layers that were never called with gradients enabled, by name; after a backward call that
                raised, for accumulated sums, which hold a part of it.
        """
        self._backward.forget_failed()
        if self._sums_are_partial:
            raise ValueError(
                "a backward call raised while recording, so the accumulated sums hold a part of its gradients; "
                "expected complete backward calls. Record again with a new GradNormRecorder."
            )
        missing = [name for name in self.linears if not self._taps.forward_calls[name] and not self._calls[name]]
        if missing:
            disabled = all(self._taps.unrecorded[name] for name in missing)
            raise ValueError(
                f"linears {missing} were {'called only under torch.no_grad' if disabled else 'never called'} while "
                f"recording; expected a forward call with gradients enabled. Leave them out, or record batches that "
                f"use them; a layer that another module replaces or bypasses is not called."
            )
        return {name: self._norm(name) for name in self.linears}

    def _norm(self, name: str) -> GradNorm:
        nothing = torch.zeros(0)
        relative_std, weights, biases = 0.0, nothing, nothing
        if self.quantity == "accumulated":
            total = self._weight_sums.get(name, nothing)
            # Rows first: one running float32 sum over a 4096 x 11008 buffer comes out 0.35 % too small.
            weight = float(total.norm(dim=-1).cpu().double().norm())
            bias = float(self._bias_sums.get(name, nothing).norm())
            if self.method == "sketch" and total.numel():
                relative_std = sketch_relative_std(total)
        else:
            weights, biases = (
                torch.cat(values[name]) if values[name] else nothing
                for values in (self._weight_values, self._bias_values)
            )
            weight, bias = (float(values.mean()) if values.numel() else 0.0 for values in (weights, biases))
        return GradNorm(
            weight=weight,
            bias=bias,
            calls=self._calls[name],
            forward_calls=self._taps.forward_calls[name],
            relative_std=relative_std,
            weight_values=weights,
            bias_values=biases,
        )

    def reduce_(self, all_reduce: Callable[[Tensor], object] | None = None) -> None:
        """Sums the accumulated buffers and the counts of calls over processes, in place.

        `all_reduce(tensor)` must sum in place; by default `torch.distributed.all_reduce`. Every process calls it with
        the same linears, in the same order, even if it has recorded no batch.
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
            counts = torch.tensor([self._calls[name], self._taps.forward_calls[name]], device=linear.weight.device)
            reduce(counts)
            self._calls[name], self._taps.forward_calls[name] = counts.tolist()

    def _sum_shape(self, linear: nn.Linear) -> tuple[int, int]:
        sketched = self.method == "sketch"
        return (self.sketch_size, self.sketch_size) if sketched else (linear.out_features, linear.in_features)


def _sketch_side(
    sides: dict[int, Tensor], width: int, size: int, linear: nn.Linear, generator: torch.Generator
) -> None:
    """N(0, 1/size) as [width, size], one for all layers of this width: the estimate of each layer is unbiased."""
    if width not in sides:
        drawn = torch.randn(width, size, generator=generator) / math.sqrt(size)
        sides[width] = drawn.to(linear.weight.device, torch.promote_types(linear.weight.dtype, torch.float32))
