# SPDX-License-Identifier: Apache-2.0
"""Which experts are active for which rows, said from outside the model: `ExpertGates` is shared by the layers of a
model, `ExpertGates.use` opens a block (`_gate_block`) with one gate for all of them."""

from __future__ import annotations

import difflib
import uuid
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dmole_kernels._expert_bank import ExpertBank, sharded_error
from dmole_kernels._gate_block import GateBlock, Recomputation, Units, ambient_blocks, merged_error
from dmole_kernels._registration import refuse_transforms

_NO_CHECKPOINT_CONTEXTS = (
    "checkpoint_contexts is used inside a compiled function; expected eager mode. Keep backward inside the `gates.use` "
    "block, where a compiled checkpoint needs no context_fn."
)


class _Named(Protocol):
    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def sharded(self) -> tuple[str, ...]: ...


class _HoldsExperts(Protocol):
    @property
    def bank(self) -> _Named: ...


class _Held(NamedTuple):
    """What the layers of some gates hold, and when that was looked up."""

    changes: int  # ExpertBank.changes
    names: tuple[str, ...]
    merged: frozenset[str]
    sharded: frozenset[str]


_NOTHING_HELD = _Held(-1, (), frozenset(), frozenset())


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
        self._held = _NOTHING_HELD
        # Layers of PEFT, whose Parameters can be exchanged without a bank that counts it.
        self._foreign: list[weakref.ref[_HoldsExperts]] = []

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
        if not isinstance(layer.bank, ExpertBank):
            self._foreign.append(weakref.ref(layer))
        self._held = _NOTHING_HELD

    @property
    def names(self) -> tuple[str, ...]:
        """The experts that the layers of these gates hold, in the order in which layers and experts were added."""
        return self._look().names

    def _look(self) -> _Held:
        if self._held.changes != ExpertBank.changes:
            self._layers = [ref for ref in self._layers if ref() is not None]
            banks = [layer.bank for ref in self._layers if (layer := ref()) is not None]
            names = tuple(dict.fromkeys(name for bank in banks for name in bank.names))
            # PEFT's adapters (dmole_kernels.peft) are merged by PEFT, which says so itself.
            merged = frozenset(name for bank in banks for name in getattr(bank, "merged", ()))
            sharded = frozenset(name for bank in banks for name in bank.sharded)
            self._held = _Held(ExpertBank.changes, names, merged, sharded)
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
                that is merged into the base, or whose parameters are sharded (DTensor);
                when a layer's rows cannot be split by the units; when the gate is changed in place inside the block;
                when blocks are left in another order than the reverse one.
            NotImplementedError: inside a torch.func transform or forward-mode differentiation.
        """
        ambient_blocks.refuse_in_graphs()
        refuse_transforms("gates.use")
        _, held, merged, sharded = self._look()
        if self._foreign:
            sharded = frozenset(n for ref in self._foreign if (layer := ref()) is not None for n in layer.bank.sharded)
        block = GateBlock(gate, experts, units, self.identity, self.lineage, held)
        known = set(held)
        for name in block.names:
            if name in merged:
                raise merged_error(name)
            if name in sharded:
                raise sharded_error(name)
            if name not in known:
                near = difflib.get_close_matches(name, held, 1)
                meant = f"Did you mean {near[0]!r}?" if near else "Add it to a layer first."
                raise ValueError(
                    f"experts: got {name!r}, which no layer of these gates holds; expected some of {list(held)}. "
                    f"{meant}"
                )
        return block

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
            return nullcontext(), nullcontext() if block is None else Recomputation(block)

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
