# SPDX-License-Identifier: Apache-2.0
"""
    rows of sample s  =  the next L * units[s] / sum(units) rows of a layer whose leading dimension is L

One open `ExpertGates.use` block: its gate, and what each layer derives from it. Rows belong to samples by declaration
(`units`), never because a dimension happens to be as long as the batch.
"""

from __future__ import annotations

import math
import operator
import sys
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dmole_kernels._ambient import Ambient, AmbientBlock
from dmole_kernels.cpu import RowMap

# What a layer's rows are: None takes the leading dimension for samples, unless the block has units.
Rows = Literal["samples", "units"] | None

Units = Sequence[int] | Tensor | int | None

KEPT_BYTES = 64 * 2**20
KEPT_ENTRIES = 1024


class LayerGate(NamedTuple):
    """The gate of one layer call: the active experts that the layer holds, and their columns."""

    names: tuple[str, ...]
    gate: Tensor | None  # [G, E]; None without names
    row_map: RowMap | None


class GateBlock(AmbientBlock):
    """A gate, the names of its columns and what layers derived from them; made by `ExpertGates.use`.

    `active` holds the experts with a non-zero gate: the only host synchronisation of a step where the gate is on a GPU.
    A gate that requires grad has all its experts active, because a gate of zero needs its gradient.
    """

    __slots__ = (
        "_bytes",
        "_kept",
        "active",
        "backward",
        "canonical_gate",
        "canonical_names",
        "counts",
        "gate",
        "lineage",
        "names",
        "ran",
        "trained",
        "units",
        "version",
    )

    def __init__(
        self, gate: Tensor, experts: Sequence[str], units: Units, identity: str, lineage: str,
        canonical_names: tuple[str, ...] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(identity)
        self.lineage = lineage
        self.names = check_gate(gate, experts)
        self.units = _check_units(units, gate.shape[0])
        if gate.is_inference():
            # A layer may keep columns of it for a later training step; an inference tensor cannot take part in one.
            with torch.inference_mode(False):
                gate = gate.clone()
        self.gate = gate
        self.version = gate._version
        self.trained = gate.requires_grad
        if self.trained:
            self.active = self.names
        else:
            used = (gate != 0).flatten(0, -2).any(0).tolist()
            self.active = tuple(name for name, flag in zip(self.names, used, strict=True) if flag)
        # For torch.compile: all experts of these gates in one order, so that no set of names is a guard.
        self.canonical_names, self.canonical_gate, self.counts = self.names, gate, None
        with torch.inference_mode(False), torch.set_grad_enabled(self.trained):
            if canonical_names is not None:
                self.canonical_names = canonical_names
                self.canonical_gate = _InOrder.apply(gate, self.names, canonical_names)  # type: ignore[no-untyped-call]
            if self.units is not None:
                self.counts = torch.tensor(self.units, dtype=torch.int64)
        self._kept: dict[object, LayerGate] = {}
        self._bytes = 0
        self.ran: set[int] = set()  # ids of the layers whose forward this block gated
        self.backward = -1  # the backward pass that opened this block, if one did

    def __enter__(self) -> None:
        ambient_blocks.enter(self, sys._getframe(1))
        self.backward = torch._C._current_graph_task_id()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kept.clear()
        ambient_blocks.leave(self)

    def again(self) -> GateBlock:
        """A block with the same gate that can be entered once more, for a recomputation."""
        block = GateBlock.__new__(GateBlock)
        AmbientBlock.__init__(block, self.identity)
        for name in GateBlock.__slots__:
            setattr(block, name, getattr(self, name))
        block._kept, block._bytes = {}, 0
        return block

    def for_layer(
        self, held: tuple[str, ...], leading: tuple[int, ...], rows: Rows, device: torch.device, with_row_map: bool
    ) -> LayerGate:
        """What a layer that holds these experts adds to a call with these leading dimensions of x.

        Kept for the other layers of the step, within KEPT_BYTES; never with autograd state, so the order of calls with
        and without gradients does not matter.
        """
        if self.gate._version != self.version:
            raise ValueError(
                "the gate was changed in place inside its `use` block; expected it as it was at the start, which the "
                "layers before this one used. Open a new block with the new gate."
            )
        key = (held, leading, rows, device, with_row_map)
        kept = self._kept.get(key)
        if kept is not None:
            if kept.gate is not None or not kept.names:
                return kept
            return kept._replace(gate=self._layer_gate(kept.names, leading, rows, device))
        names = tuple(name for name in self.active if name in held)
        gate, row_map = None, None
        if names:
            with torch.inference_mode(False), torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
                gate = self._layer_gate(names, leading, rows, device)
            if with_row_map:
                row_map = RowMap(gate, math.prod(leading))
        found = LayerGate(names, gate, row_map)
        self._keep(key, found._replace(gate=None) if self.trained else found)
        return found

    def _keep(self, key: object, found: LayerGate) -> None:
        # Threads may share a block: those that inherited it, and the autograd engine's.
        with _KEEPING:
            self._kept[key] = found
            self._bytes += _size(found)
            while self._bytes > KEPT_BYTES or len(self._kept) > KEPT_ENTRIES:
                self._bytes -= _size(self._kept.pop(next(iter(self._kept))))

    def _layer_gate(self, names: tuple[str, ...], leading: tuple[int, ...], rows: Rows, device: torch.device) -> Tensor:
        gate = self.gate
        if names != self.names:
            gate = gate[..., [self.names.index(name) for name in names]]
        if gate.device != device:
            gate = gate.to(device, non_blocking=True)
        counts = self.rows_of_samples(leading, rows)
        if counts is not None:
            each = torch.tensor(counts, dtype=torch.int64, device=device)
            gate = gate.repeat_interleave(each, 0, output_size=sum(counts))
        return gate.reshape(-1, len(names))

    def rows_of_samples(self, leading: tuple[int, ...], rows: Rows) -> list[int] | None:
        """How often each sample's gate is repeated along the leading dimension; None: each covers an equal number of
        consecutive rows."""
        samples = self.gate.shape[0]
        if self.units is None:
            if rows == "units":
                raise ValueError(
                    "the rows of this layer are not samples (it was converted with rows='units'), and the block has no "
                    "units; expected how much of its input belongs to each sample. Pass use(..., units=[...]), such as "
                    "the number of images of each sample."
                )
            if leading[: self.gate.dim() - 1] != self.gate.shape[:-1]:
                raise ValueError(
                    f"gate has shape {tuple(self.gate.shape)} and x {(*leading, '...')}; expected gate's leading "
                    f"dimensions to begin x's. Use [samples, experts] gates for x [samples, ..., features], "
                    f"[samples, tokens, experts] gates, or pass use(..., units=...) where rows are not samples."
                )
            return None
        units = (1,) * samples if rows == "samples" else self.units
        tokens = self.gate.shape[1:-1]
        place = 1 if leading[0] == 1 and len(leading) > 1 and not tokens else 0
        length, total = leading[place], sum(units)
        if (total == 0 and length) or any(length * unit % total for unit in units if total):
            raise ValueError(
                f"x has {length} rows along dimension {place} for units {list(units)}; expected a multiple that gives "
                f"every sample a whole number of rows. Check the units: the number of images, or of image tokens, of "
                f"each sample."
            )
        if tokens and leading[1 : 1 + len(tokens)] != tokens:
            raise ValueError(
                f"gate has shape {tuple(self.gate.shape)} and x {(*leading, '...')}; expected x "
                f"{('rows', *tokens)} for token gates with units. Use [samples, experts] gates for flattened rows."
            )
        if length == samples * (length // max(1, samples)) and len(set(units)) == 1:
            return None if not tokens or length == samples else [length // samples] * samples
        return [length * unit // total if total else 0 for unit in units]


def merged_error(name: str) -> ValueError:
    return ValueError(
        f"experts: got {name!r}, which is merged into the base and so acts on every sample already; expected experts "
        f"that are not merged. Call unmerge({name!r}) first, or leave it out with its column of the gate."
    )


def check_gate(gate: Tensor, experts: Sequence[str]) -> tuple[str, ...]:
    """The names of the gate's columns. Raises ValueError when they do not fit."""
    if not isinstance(gate, Tensor):
        raise ValueError(
            f"gate is a {type(gate).__name__}; expected a tensor [samples, experts]. Use torch.tensor({gate!r})."
        )
    if isinstance(experts, str):
        raise ValueError(f"experts is the string {experts!r}; expected a list of names. Use [{experts!r}].")
    names = tuple(experts)
    if gate.dim() < 2 or gate.shape[-1] != len(names) or len(set(names)) != len(names):
        raise ValueError(
            f"gate has shape {tuple(gate.shape)} for experts {list(names)}; expected [samples, {len(names)}] or "
            f"[samples, tokens, {len(names)}] and distinct names. Give each expert one column."
        )
    return names


def _check_units(units: Units, samples: int) -> tuple[int, ...] | None:
    if units is None:
        return None
    if isinstance(units, Tensor):
        units = units.tolist()
    given = (units,) * samples if isinstance(units, int) else tuple(units)
    try:
        whole = tuple(operator.index(unit) for unit in given)
        fits = len(whole) == samples and all(unit >= 0 and not isinstance(unit, bool) for unit in given)
    except TypeError:
        fits = False
    if not fits:
        raise ValueError(
            f"units={list(given)} for {samples} samples; expected one whole number of at least 0 per sample. Pass the "
            f"number of images of each sample, or 1 where every sample has as many rows."
        )
    return whole


class _InOrder(torch.autograd.Function):
    """A copy of the gate with a column for each name of `order`, zeros where `names` lacks it.

    Saves no tensors: the compiled layers of a block share this node, and each backward pass through them may free what
    it used.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, names: tuple[str, ...], order: tuple[str, ...]) -> Tensor:
        ctx.columns = [(names.index(name), place) for place, name in enumerate(order) if name in names]
        ctx.shape = gate.shape
        if names == order:
            return gate.clone()
        full = gate.new_zeros((*gate.shape[:-1], len(order)))
        if ctx.columns:
            columns, places = zip(*ctx.columns, strict=True)
            full[..., places] = gate[..., columns]
        return full

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        own = grad.new_zeros(ctx.shape)
        if ctx.columns:
            columns, places = zip(*ctx.columns, strict=True)
            own[..., columns] = grad[..., places]
        return own, None, None


class Recomputation:
    """The block of a forward, opened once more for each recomputation of it: one a backward pass."""

    def __init__(self, block: GateBlock) -> None:
        self._block = block
        self._open: list[GateBlock] = []

    def __enter__(self) -> None:
        block = self._block.again()
        ambient_blocks.enter(block, sys._getframe(1))
        self._open.append(block)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.pop().__exit__(kind, error, trace)


def traced_rows(gate: Tensor, x: Tensor, counts: Tensor | None, rows: Rows) -> Tensor:
    """`GateBlock.rows_of_samples` under torch.compile: lengths may be symbols, and units are a tensor, so that no
    units are a guard; a length that they do not divide is an error of the compiled function when it runs."""
    leading = gate.shape[:-1]
    if counts is None:
        if rows == "units":
            raise ValueError(
                "the rows of this layer are not samples (it was converted with rows='units'), and the block has no "
                "units; expected how much of its input belongs to each sample. Pass use(..., units=[...])."
            )
        if tuple(x.shape[: len(leading)]) != tuple(leading):
            raise ValueError(
                f"gate has shape {tuple(gate.shape)} and x {tuple(x.shape)}; expected gate's leading dimensions to "
                f"begin x's. Pass use(..., units=...) where rows are not samples."
            )
        return gate
    place = 1 if x.shape[0] == 1 and x.dim() > 2 and len(leading) == 1 else 0
    if len(leading) > 1 and tuple(x.shape[1 : len(leading)]) != tuple(leading[1:]):
        raise ValueError(
            f"gate has shape {tuple(gate.shape)} and x {tuple(x.shape)}; expected x [rows, tokens, ...] for token "
            f"gates with units. Use [samples, experts] gates for flattened rows."
        )
    length = x.shape[place]
    units = torch.ones_like(counts) if rows == "samples" else counts
    total = units.sum()
    each = units * length // total.clamp(min=1)
    torch._assert_async(
        (each * total == units * length).all() & (each.sum() == length),
        "the units of gates.use do not give every sample a whole number of rows of this layer",
    )
    return gate.repeat_interleave(each.to(gate.device), 0, output_size=length)


def _size(found: LayerGate) -> int:
    tensors = (found.gate, None if found.row_map is None else found.row_map.table)
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


ambient_blocks: Ambient[GateBlock] = Ambient("gates.use", strict=True)
_KEEPING = threading.Lock()
