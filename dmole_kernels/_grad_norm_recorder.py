# SPDX-License-Identifier: Apache-2.0
"""Weight-gradient norms of chosen linears during ordinary backward calls, with every parameter frozen.

A forward hook keeps the layer's input; when backward reaches the layer's output, the gradient there and that input give
the norm (`_grad_norm`). No other layer's weight gradient is ever computed, and no parameter's `.grad` is allocated.

A layer that is called several times in one forward has one gradient, the sum over its calls: their tokens side by side
have the same gradient, so the calls are kept until backward ends and taken together.
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
from dmole_kernels._grad_norm_taps import NO_TASK, Tap, WeightReads, current_task

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


class GradNormRecorder:
    """Context manager; `norms()` after (or inside) it.

        with GradNormRecorder({"q_proj": layer.q_proj}) as recorder:
            model(**batch).loss.backward()
        recorder.norms()["q_proj"].weight

    Args:
        linears: the layers by name. A weight under two names is an error: its gradient is the sum over both.
        quantity: "accumulated" (norm of the sum over all backward calls in the block: D-MoLE's score), "per_batch" (one
            norm a backward call) or "per_sample" (one norm for each index of the input's first dimension). The calls of
            a layer in one forward add up to one gradient, a recomputation by a checkpoint counts once, and two calls of
            backward are two batches.
        method: accumulated: "exact" (a float32 buffer of the weight's size for each layer) or "sketch" (sketch_size^2,
            an unbiased estimate of the squared norm, see GradNorm.relative_std); else "direct" or "ghost". "auto" is
            exact for accumulated, fewer flops for the others.
        sketch_size: side of the sketch; the relative error falls as its square root.
        generator: draws the sketch matrices; None uses one with a fixed seed, the same on every process, as adding
            sketches over processes needs.
        model: the model of the layers. Its modules are searched for other users of the layers' weights.
        backend: see `choose_backend`.

    A weight that something else reads too has a larger gradient than the layer alone: where another module of `model`
    holds it, or a torch function reads it outside the layer's forward inside the block, that is an error by name. Not
    noticed: reads inside compiled code and by custom C++ functions.

    Raises:
        ValueError: for settings that do not go together, a weight under two names or in two modules; in `norms`, for a
            layer that was never called, or whose weight was read elsewhere.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        *,
        model: nn.Module | None = None,
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
        own = {id(linear) for linear in linears.values()}
        for place, module in () if model is None else model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None and id(parameter) in owners and id(module) not in own:
                    raise ValueError(
                        f"linear {owners[id(parameter)]!r} shares its weight with {place or 'the model'!r}; expected a "
                        f"weight of its own. Leave it out: its gradient is the sum over both places."
                    )
        self._reads = WeightReads(owners)
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
        self._forwards = dict.fromkeys(linears, 0)
        # Forward calls whose backward has not come yet, and what the backward calls that run have brought so far.
        self._pending = dict.fromkeys(linears, 0)
        self._collected: dict[int, dict[str, list[tuple[Tensor, Tensor]]]] = {}
        self._masks: list[tuple[Tensor, frozenset[str]]] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> GradNormRecorder:
        if self._handles:
            raise ValueError(
                "this GradNormRecorder is already recording; expected one `with` at a time. Leave it first."
            )
        for name, linear in self.linears.items():
            self._handles.append(linear.register_forward_pre_hook(self._enter_layer(name)))
            self._handles.append(linear.register_forward_hook(self._forward_hook(name), with_kwargs=True))
        self._reads.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reads.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._collected.clear()

    @contextmanager
    def mask(self, mask_BT: Tensor, names: Collection[str] | None = None) -> Iterator[None]:
        """Ignores the tokens with mask False (padding) in the layers called `names` (all when None) during the block.

        Masks are read in forward; of nested blocks the innermost for a layer holds. A masked layer's input must be
        [B, T, ...]. What masked tokens hold does not matter, NaN and inf included.

        Args:
            mask_BT: bool, or integers of which those that are not zero count as True.

        Raises:
            ValueError: for a floating mask (an additive one has zeros where tokens count), or names that are no layers.
        """
        if mask_BT.is_floating_point() or mask_BT.is_complex():
            raise ValueError(
                f"mask is {mask_BT.dtype}; expected booleans or integers, True where a token counts. An additive mask "
                f"is 0 there: pass mask == 0."
            )
        mask_BT = mask_BT != 0
        chosen = frozenset(self.linears if names is None else names)
        unknown = chosen - set(self.linears)
        if unknown:
            raise ValueError(f"names has {sorted(unknown)}; expected some of {list(self.linears)}. Check the spelling.")
        self._masks.append((mask_BT, chosen))
        try:
            yield
        finally:
            self._masks.pop()

    def _enter_layer(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            self._reads.inside.append(name)

        return hook

    def _forward_hook(self, name: str) -> Callable[[nn.Module, Any, Any, Tensor], Tensor | None]:
        switch = torch.zeros((), requires_grad=True, device="cpu")

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], keywords: Any, output: Tensor) -> Tensor | None:
            if name in self._reads.inside:
                self._reads.inside.remove(name)
            self._forwards[name] += 1
            task = current_task()
            if task == NO_TASK:
                # Without gradients, too: a reentrant checkpoint's first forward is such a call.
                self._pending[name] += 1
            if not torch.is_grad_enabled():
                return None
            mask = next((mask for mask, names in reversed(self._masks) if name in names), None)
            x = inputs[0] if inputs else keywords["input"]
            if mask is not None and x.shape[:2] != mask.shape:
                raise ValueError(
                    f"mask has shape {tuple(mask.shape)} but the input of {name!r} is {tuple(x.shape)}; expected the "
                    f"same [batch, tokens]. Name the layers the mask is for: recorder.mask(mask, names=[...])."
                )
            if task != NO_TASK:
                self._finish_at_the_end_of(task)
            tapped: Tensor = Tap.apply(  # type: ignore[no-untyped-call]
                output, x.detach(), switch, lambda x, grad, task: self._record(name, mask, x, grad, task)
            )
            return tapped

        return hook

    def _finish_at_the_end_of(self, task: int) -> None:
        """Called while that backward runs."""
        if task not in self._collected:
            self._collected[task] = {}
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._finish(task))

    @torch.no_grad()
    def _record(self, name: str, mask: Tensor | None, x: Tensor, grad: Tensor, task: int) -> None:
        if not self._handles:
            return
        self._calls[name] += 1
        if mask is not None:
            shown = mask.reshape(*mask.shape, *[1] * (grad.dim() - 2))
            zero = torch.zeros((), dtype=grad.dtype, device=grad.device)
            # A choice, not a product: 0 * NaN is NaN. x too, since 0 * NaN in its product would be.
            grad, x = torch.where(shown, grad, zero), torch.where(shown, x, zero.to(x.dtype))
        if x.dim() == 1:
            x, grad = x[None], grad[None]
        if self.quantity == "accumulated":
            self._accumulate(name, x, grad)
        elif self._pending[name] == 1 and not self._collected.get(task, {}).get(name):
            self._pending[name] = 0
            self._add_values(name, [(x, grad)])
        else:
            self._finish_at_the_end_of(task)
            self._collected[task].setdefault(name, []).append((x, grad))

    @torch.no_grad()
    def _finish(self, task: int) -> None:
        """One value for all calls of each layer in this backward."""
        for name, calls in self._collected.pop(task, {}).items():
            self._pending[name] = 0
            self._add_values(name, calls)

    def _accumulate(self, name: str, x: Tensor, grad: Tensor) -> None:
        wide = torch.promote_types(grad.dtype, torch.float32)
        x_ND, grad_NP = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        if self.linears[name].bias is not None:
            column_sum_P = grad_NP.to(wide).sum(0)
            self._bias_sums[name] = self._bias_sums[name] + column_sum_P if name in self._bias_sums else column_sum_P
        if name not in self._weight_sums:
            shape = self._sum_shape(self.linears[name])
            self._weight_sums[name] = torch.zeros(shape, dtype=wide, device=grad.device)
        total = self._weight_sums[name]
        if self.method == "sketch":
            left, right = self._left[grad_NP.shape[1]].to(wide), self._right[x_ND.shape[1]].to(wide)
            accumulate_sketch(total, x_ND, grad_NP, left, right, backend=self.backend)
        else:
            accumulate_gradient(total, x_ND, grad_NP, backend=self.backend)

    def _add_values(self, name: str, calls: list[tuple[Tensor, Tensor]]) -> None:
        """The norms of the sum over these calls: their tokens side by side have that gradient."""
        method: Any = self.method
        x, grad = calls[0]
        wide = torch.promote_types(grad.dtype, torch.float32)
        has_bias = self.linears[name].bias is not None
        if self.quantity == "per_batch":
            x_ND = torch.cat([x.reshape(-1, x.shape[-1]) for x, _ in calls])
            grad_NP = torch.cat([grad.reshape(-1, grad.shape[-1]) for _, grad in calls])
            norm = grad_norm_per_batch(x_ND, grad_NP, method=method, backend=self.backend)
            self._weight_values[name].append(norm[None])
            if has_bias:
                self._bias_values[name].append(grad_NP.to(wide).sum(0).norm()[None])
            return
        samples = {x.shape[0] for x, _ in calls}
        if len(samples) > 1:
            raise ValueError(
                f"linear {name!r} was called with {sorted(samples)} samples in one backward; expected one number, "
                f"since a sample's norm is that of the sum over the calls. Use quantity='per_batch'."
            )
        (count,) = samples
        x_BTD = torch.cat([x.reshape(count, math.prod(x.shape[1:-1]), x.shape[-1]) for x, _ in calls], 1)
        grad_BTP = torch.cat([g.reshape(count, math.prod(g.shape[1:-1]), g.shape[-1]) for _, g in calls], 1)
        self._weight_values[name].append(grad_norm_per_sample(x_BTD, grad_BTP, method=method, backend=self.backend))
        if has_bias:
            self._bias_values[name].append(grad_BTP.to(wide).sum(1).norm(dim=1))

    def norms(self) -> dict[str, GradNorm]:
        """The norms so far, one entry for each linear, in the order they were given.

        Raises:
            ValueError: for a layer that no forward inside the block has called, or whose weight was read elsewhere.
        """
        unused = [name for name, count in self._forwards.items() if not count]
        if unused:
            raise ValueError(
                f"linears {unused[:5]} were never called inside the block ({len(unused)} of {len(self.linears)}); "
                f"expected every one to run in forward. Leave them out, or run the part of the model that uses them."
            )
        if self._reads.noticed:
            name, function = next(iter(self._reads.noticed.items()))
            raise ValueError(
                f"the weight of linear {name!r} is also read outside its forward, by {function}; expected the layer to "
                f"be its only user. Leave it out: its gradient is the sum over both places."
            )
        return {name: self._norm(name) for name in self.linears}

    def _norm(self, name: str) -> GradNorm:
        nothing = torch.zeros(0, device="cpu")
        if self.quantity == "accumulated":
            total, bias = (
                self._weight_sums.get(name, torch.zeros(0, 0, device="cpu")),
                self._bias_sums.get(name, nothing),
            )
            return GradNorm(
                # Rows first: one running float32 sum over a 4096 x 11008 buffer comes out 0.35 % too small.
                weight=float(total.norm(dim=1).cpu().double().norm()),
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
        drawn = torch.randn(width, size, generator=generator, device="cpu") / math.sqrt(size)
        sides[width] = drawn.to(linear.weight.device, torch.promote_types(linear.weight.dtype, torch.float32))
