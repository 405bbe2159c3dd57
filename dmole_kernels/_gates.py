# SPDX-License-Identifier: Apache-2.0
"""
    rows of sample s  =  the next L * units[s] / sum(units) rows of a layer whose leading dimension is L

Which experts are active for which rows, said from outside the model: `ExpertGates` is shared by the layers of a model,
`ExpertGates.use` opens a block with one gate for all of them. Rows belong to samples by declaration (`units`), never
because a dimension happens to be as long as the batch.
"""

from __future__ import annotations

import difflib
import math
import operator
import sys
import threading
import uuid
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dmole_kernels._ambient import Ambient, AmbientBlock
from dmole_kernels._expert_bank import ExpertBank
from dmole_kernels.cpu import RowMap

# What a layer's rows are: None takes the leading dimension for samples, unless the block has units.
Rows = Literal["samples", "units"] | None

Units = Sequence[int] | Tensor | int | None

_NO_CHECKPOINT_CONTEXTS = (
    "checkpoint_contexts is used inside a compiled function; expected eager mode. Keep backward inside the `gates.use` "
    "block, where a compiled checkpoint needs no context_fn."
)

KEPT_BYTES = 64 * 2**20
KEPT_ENTRIES = 1024


class LayerGate(NamedTuple):
    """The gate of one layer call: the active experts that the layer holds, and their columns."""

    names: tuple[str, ...]
    gate: Tensor | None  # [G, E]; None without names
    row_map: RowMap | None


class _Named(Protocol):
    @property
    def names(self) -> tuple[str, ...]: ...


class _HoldsExperts(Protocol):
    @property
    def bank(self) -> _Named: ...


class ExpertGates:
    """The gates that all layers of a model, or of one tower, share for the time of a `with` block.

        gates = ExpertGates()
        layer = MultiLoRALinear(linear, gates=gates)
        layer.bank.add("charts", rank=8, alpha=16.0)
        layer.bank.add("maps", rank=4, alpha=8.0)
        with gates.use(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), ["charts", "maps"]):
            model(batch_of_two).loss.backward()

    A block belongs to the thread, asyncio task or generator that opened it: requests that overlap in time each see
    their own experts, and a thread that was started without a copy of the context sees none. With gradient
    checkpointing the layers run again during backward: keep backward inside the block, or give the checkpoint
    `context_fn=gates.checkpoint_contexts`.

    A copy (`deepcopy`, pickle) is a new set of gates for the copied layers; running those under a block of the original
    raises.
    """

    def __init__(self) -> None:
        self.identity = uuid.uuid4().hex
        self.lineage = self.identity
        self._layers: list[weakref.ref[_HoldsExperts]] = []
        # Of which state of the banks, the names that the layers hold, and those that some layer has merged.
        self._held: tuple[int, tuple[str, ...], frozenset[str]] = (-1, (), frozenset())

    def __deepcopy__(self, memo: dict[int, object]) -> ExpertGates:
        copy = ExpertGates()
        copy.lineage = self.lineage
        memo[id(self)] = copy
        return copy

    def __getstate__(self) -> dict[str, str]:
        return {"lineage": self.lineage}

    def __setstate__(self, state: dict[str, str]) -> None:
        ExpertGates.__init__(self)
        self.lineage = state["lineage"]

    def register(self, layer: _HoldsExperts) -> None:
        """Called by each layer that is made with these gates."""
        self._layers.append(weakref.ref(layer))
        self._held = (-1, (), frozenset())

    @property
    def names(self) -> tuple[str, ...]:
        """The experts that the layers of these gates hold, in the order in which layers and experts were added."""
        return self._look()[1]

    def _look(self) -> tuple[int, tuple[str, ...], frozenset[str]]:
        if self._held[0] != ExpertBank.changes:
            self._layers = [ref for ref in self._layers if ref() is not None]
            banks = [layer.bank for ref in self._layers if (layer := ref()) is not None]
            names = tuple(dict.fromkeys(name for bank in banks for name in bank.names))
            # PEFT's adapters (dmole_kernels.peft) are merged by PEFT, which says so itself.
            merged = frozenset(name for bank in banks for name in getattr(bank, "merged", ()))
            self._held = (ExpertBank.changes, names, merged)
        return self._held

    @property
    def block(self) -> GateBlock | None:
        """The block that applies here (this thread, task and generator), or None."""
        return ambient_blocks.innermost(self.identity)

    @property
    def active(self) -> bool:
        """Whether some expert has a non-zero gate here."""
        block = self.block
        return block is not None and len(block.active) > 0

    def use(self, gate: Tensor, experts: Sequence[str], *, units: Units = None) -> GateBlock:
        """A `with` block in which the layers add these experts; inner blocks replace outer ones.

        Args:
            gate: [samples, experts] or [samples, tokens, experts]; any real values; differentiable.
            experts: the names of the gate's columns.
            units: how much of the input of the gated layers belongs to each sample: a layer with leading dimension L
                (dimension 1 where dimension 0 is 1) gives sample s its next `L * units[s] / sum(units)` rows. The
                number of images of each sample for a vision tower, 1 for layers with as many rows for each
                sample (flattened tokens, beams, num_return_sequences). None: the leading dimension is the samples.

        A layer marked `rows="samples"` counts one unit per sample whatever `units` is; one marked `rows="units"` raises
        without units.

            units = [2, 0, 1], x [3, ...]:    rows 0 and 1 use gate[0], row 2 uses gate[2]
            units = [1, 1], x [6, ...]:       rows 0 to 2 use gate[0], rows 3 to 5 gate[1]         three beams

        Raises:
            ValueError: for a gate, names or units that do not fit together; a name that no layer of these gates holds,
                or that is merged into the base;
                when a layer's rows cannot be split by the units; when the gate is changed in place inside the block;
                when blocks are left in another order than the reverse one.
        """
        ambient_blocks.refuse_in_graphs()
        _, held, merged = self._look()
        block = GateBlock(gate, experts, units, self.identity, self.lineage, held)
        known = set(held)
        for name in block.names:
            if name in merged:
                raise merged_error(name)
            if name not in known:
                near = difflib.get_close_matches(name, held, 1)
                meant = f"Did you mean {near[0]!r}?" if near else "Add it to a layer first."
                raise ValueError(
                    f"experts: got {name!r}, which no layer of these gates holds; expected some of {list(held)}. "
                    f"{meant}"
                )
        if torch.is_grad_enabled():
            self._refuse_sharded(block.names)
        return block

    def _refuse_sharded(self, names: tuple[str, ...]) -> None:
        """FSDP2 reduces gradients by position: processes whose samples use different experts would get each other's.

        Outside of forward a sharded parameter is a DTensor; inside, where layers could look, it is a plain one.
        """
        for ref in self._layers:
            layer = ref()
            held = getattr(None if layer is None else layer.bank, "experts", None)
            if held is None:
                continue
            for name in names:
                expert = held._modules.get(name)
                if expert is not None and type(expert._parameters["lora_a"]) is DTensor and expert.lora_a.requires_grad:
                    raise ValueError(
                        f"expert {name!r} is sharded (a DTensor); expected plain parameters, since processes that use "
                        f"different experts would get each other's gradients. Call fully_shard(..., "
                        f"ignored_params=set(experts.parameters())) and experts.reduce_gradients() after backward."
                    )

    @property
    def checkpoint_contexts(self) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
        """For `torch.utils.checkpoint.checkpoint(context_fn=gates.checkpoint_contexts)`, of the kind that is not
        reentrant: recomputes under the gates of the first forward, wherever backward runs."""
        if torch.compiler.is_dynamo_compiling():
            raise ValueError(_NO_CHECKPOINT_CONTEXTS)

        # A function, not a method: torch.compile calls what a checkpoint is given without its `self`.
        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            if torch.compiler.is_dynamo_compiling() or torch._guards.TracingContext.try_get() is not None:
                raise ValueError(_NO_CHECKPOINT_CONTEXTS)
            block = self.block
            return nullcontext(), nullcontext() if block is None else _Recomputation(block)

        return contexts

    def refuse_other_copies(self) -> None:
        """Raises ValueError where a block of the gates that these were copied from, or of a copy of these, is open."""
        for block in ambient_blocks.open_blocks():
            if block.lineage == self.lineage and block.identity != self.identity:
                raise ValueError(
                    "the layer's gates are a copy, and the open block belongs to the original (or the reverse); "
                    "expected a block of the layer's own gates. Use experts_of(copied_model).use(...) or "
                    "copied_layer.gates.use(...)."
                )


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
                self.counts = torch.tensor(self.units, dtype=torch.int64, device="cpu")
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


class _Recomputation:
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
