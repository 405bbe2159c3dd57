# SPDX-License-Identifier: Apache-2.0
"""
    y = base(x) + sum_e gate_e alpha_e / rank_e B_e A_e dropout(x)

`MultiLoRALinear` is `multi_lora` dressed as a drop-in for `nn.Linear`; `ExpertGates` tells every layer of a model, from
outside and without touching the model's own forward, which experts serve which samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from dmole_kernels._backend import choose_backend
from dmole_kernels._expert_bank import Expert, ExpertBank
from dmole_kernels._frozen_linear import frozen_linear, is_frozen
from dmole_kernels._fused_linear import fused_linear
from dmole_kernels._multi_lora import DropoutMode, check_dropout, multi_lora
from dmole_kernels._transforms import values_are_hidden
from dmole_kernels.cpu import RowMap


class GatePlan:
    """A gate and the names of its columns, with the columns some row uses found once for all layers.

    A gate on the CPU beside a model on a GPU goes there when a layer asks for it, and no step waits for the GPU; of one
    on the GPU, `active` costs the only host synchronisation of a step. A gate that requires grad has all its experts
    active: an expert at gate zero still owes that zero a gradient.
    """

    def __init__(self, gate: Tensor, experts: Sequence[str]) -> None:
        names = tuple(experts)
        if gate.dim() < 2 or gate.shape[-1] != len(names) or len(set(names)) != len(names):
            raise ValueError(
                f"gate has shape {tuple(gate.shape)} for experts {list(names)}; expected [samples, {len(names)}] or "
                f"[samples, tokens, {len(names)}] and distinct names. Give each expert one column."
            )
        self.gate = gate
        self.names = names
        # Under torch.compile and torch.func values cannot be looked at: every expert counts, and zero gates add zero.
        if gate.requires_grad or values_are_hidden():
            self.active = names
        else:
            used = (gate != 0).flatten(0, -2).any(0).tolist()
            self.active = tuple(name for name, flag in zip(names, used, strict=True) if flag)
        self._columns: dict[tuple[tuple[str, ...], torch.device], Tensor] = {}
        self._rows: dict[tuple[tuple[str, ...], int], RowMap] = {}

    def columns(self, names: tuple[str, ...], device: torch.device | None = None) -> Tensor:
        """The gate of just these experts, [..., len(names)], on the device (None: the gate's own); kept, since many
        layers hold the same experts."""
        device = self.gate.device if device is None else device
        if names == self.names and device == self.gate.device:
            return self.gate
        kept = self._columns.get((names, device))
        if kept is None:
            kept = self.gate if names == self.names else self.gate[..., [self.names.index(name) for name in names]]
            kept = kept.to(device, non_blocking=True)
            # A tensor of a transform must not outlive it.
            if not values_are_hidden():
                self._columns[names, device] = kept
        return kept

    def rows(self, names: tuple[str, ...], count: int) -> RowMap:
        """Which of `count` rows each of these experts serves; kept, since many layers ask."""
        kept = self._rows.get((names, count))
        if kept is None:
            gate = self.columns(names)
            kept = RowMap(gate.reshape(-1, gate.shape[-1]), count, every_column=gate.requires_grad)
            self._rows[names, count] = kept
        return kept


class ExpertGates:
    """The gates all layers of a tower share, set for the time of a `with` block.

        gates = ExpertGates()
        layer = MultiLoRALinear(linear, gates=gates)
        with gates.use(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), ["charts", "maps"]):
            model(batch_of_two).loss.backward()

    With gradient checkpointing the layers run again during backward: keep backward inside the block, or give the
    checkpoint `context_fn=gates.checkpoint_contexts`.
    """

    def __init__(self) -> None:
        self._plans: list[GatePlan | None] = []

    @property
    def plan(self) -> GatePlan | None:
        return self._plans[-1] if self._plans else None

    @property
    def active(self) -> bool:
        """Whether any expert has a non-zero gate now."""
        return self.plan is not None and len(self.plan.active) > 0

    @contextmanager
    def use(self, gate: Tensor, experts: Sequence[str]) -> Iterator[None]:
        """Gates [samples, experts] or [samples, tokens, experts] for the block; inner blocks replace outer ones."""
        with self._entered(GatePlan(gate, experts)):
            yield

    @contextmanager
    def _entered(self, plan: GatePlan | None) -> Iterator[None]:
        self._plans.append(plan)
        try:
            yield
        finally:
            self._plans.pop()

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For `torch.utils.checkpoint.checkpoint(context_fn=...)`: recomputes under the gates of the first forward."""
        return nullcontext(), self._entered(self.plan)


class MultiLoRALinear(nn.Module):
    """`nn.Linear` plus the gated experts of its `bank`.

    Args:
        base: the layer to extend; it is frozen here and keeps its hooks.
        gates: who is active when forward gets no gate of its own; shared by many layers.
        dropout: chance of zeroing an element of the experts' input while training.
        dropout_mode: "shared" (one mask for all experts of the layer, the default) or "per_expert".
        backend: see `choose_backend`.
        fuse_base: an experiment of the Triton backend: base and experts in one launch (`fused_linear`). It reads the
            base's weight and bias, so hooks on the base do not see the call.

    Where no gate is on forward is `base(x)` to the bit; where one is, but no expert of this layer's, the base's product
    and nothing else. Beside such a gate a plain `nn.Linear` without hooks is multiplied by `frozen_linear`, any other
    base by its own forward. Experts are float32
    (float64 for a float64 base): small updates vanish in bfloat16.
    """

    def __init__(
        self,
        base: nn.Linear,
        *,
        gates: ExpertGates | None = None,
        dropout: float = 0.0,
        dropout_mode: DropoutMode = "shared",
        backend: str = "auto",
        fuse_base: bool = False,
    ) -> None:
        super().__init__()
        check_dropout(dropout, dropout_mode)
        choose_backend(backend, base.weight.device.type)
        self.base = base.requires_grad_(False)
        self.gates = gates
        self.dropout = dropout
        self.dropout_mode: DropoutMode = dropout_mode
        self.backend = backend
        self.fuse_base = fuse_base
        dtype = torch.float64 if base.weight.dtype == torch.float64 else torch.float32
        self.bank = ExpertBank(base.in_features, base.out_features, device=base.weight.device, dtype=dtype)

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor, gate: Tensor | None = None, experts: Sequence[str] | None = None) -> Tensor:
        """y [..., out_features] for x [..., in_features]; an explicit gate replaces the ambient one.

        Experts named by the gate that this layer does not hold are skipped. `experts` defaults to the bank's own order.
        """
        if gate is not None:
            plan: GatePlan | None = GatePlan(gate, self.bank.names if experts is None else experts)
        else:
            plan = self.gates.plan if self.gates is not None else None
        if plan is None or not plan.active:
            unchanged: Tensor = self.base(x)
            return unchanged
        # The dict itself: a ModuleDict takes microseconds to answer, an expert.
        held: dict[str, Expert] = self.bank.experts._modules  # type: ignore[assignment]
        names = tuple(name for name in plan.active if name in held)
        if not names:
            return self._base_output(x)
        # Autocast would cast x in the base, the op cast it again, and once more in backward, and each cast its dx back.
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        chosen = [held[name] for name in names]
        gates = plan.columns(names, x.device)
        tensors = ([e.lora_a for e in chosen], [e.lora_b for e in chosen], gates, [e.scale for e in chosen])
        dropout = self.dropout if self.training else 0.0
        if self.fuse_base:
            return fused_linear(
                x, self.base.weight, self.base.bias, *tensors, dropout=dropout, dropout_mode=self.dropout_mode,
                backend=self.backend,
            )  # fmt: skip
        y = self._base_output(x)
        rows = None
        if (
            not values_are_hidden()
            and gates.shape[:-1] == x.shape[: gates.dim() - 1]
            and choose_backend(self.backend, x.device.type, y.dtype).name == "cpu"
        ):
            rows = plan.rows(names, x.shape[:-1].numel())
        return multi_lora(
            x, y, *tensors, dropout=dropout, dropout_mode=self.dropout_mode, backend=self.backend, plan=rows
        )  # fmt: skip

    def _base_output(self, x: Tensor) -> Tensor:
        """base(x); a plain frozen `nn.Linear` without hooks goes through `frozen_linear`, to the same equation."""
        base = self.base
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        if type(base) is nn.Linear and not hooked and is_frozen(x, base.weight, base.bias):
            return frozen_linear(x, base.weight, base.bias, backend=self.backend)
        y: Tensor = base(x)
        return y

    def extra_repr(self) -> str:
        return f"dropout={self.dropout:g}, dropout_mode={self.dropout_mode}, backend={self.backend}"
