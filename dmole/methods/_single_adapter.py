# SPDX-License-Identifier: Apache-2.0
"""One LoRA on every candidate linear, active for every sample: what Seq-FT, Finetune and Joint share.

    y = W0 x + b + s B A x,   s = lora.alpha / lora.rank

All methods compare at equal trainable parameters: an expert of rank r on half of the linears (D-MoLE's budget) trains
as many weights as an adapter of rank r / 2 on all of them, exactly so when the linears have equal sizes
(`parity_rank`). The scale s does not change with the rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dmole.files import JSON
from dmole.methods.base import Method, RoutingRecord, Sizes
from dmole.methods.dmole.allocation import capacities, check_budget, total_budget
from dmole.methods.dmole.settings import DMoLESettings
from dmole.methods.settings import MethodSettings
from dmole.models.adapters import (
    adapter_state,
    add_experts,
    attach,
    expert_parameters,
    experts_on,
    load_adapter_state,
    remove_expert,
)
from dmole.seeding import derived_generator
from dmole_kernels import ExpertGates

if TYPE_CHECKING:
    from dmole.data.collate import Batch
    from dmole.data.sample import Stream, Task
    from dmole.models.vision_language import VisionLanguageModel

ADAPTER = "adapter"


def parity_rank(rank: int, dmole: DMoLESettings, sizes: Mapping[str, Mapping[str, int]]) -> int:
    """The rank on ALL candidates that trains closest to as many weights as D-MoLE's budget does at `rank`; at least 1.

    sizes[tower][linear] is in + out, the weights of a rank-1 expert there. D-MoLE's allocation differs by task, so its
    count is taken as budget x the mean unit of the towers it uses.
    """
    used = _budget_scope(dmole, sizes)
    share = _budget(dmole, used) / sum(capacities(used, dmole.unit).values())
    weights = share * sum(sum(sizes[tower].values()) for tower in used)
    return max(1, round(rank * weights / sum(sum(linears.values()) for linears in sizes.values())))


def _budget_scope(dmole: DMoLESettings, linears: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    return {tower: tuple(names) for tower, names in linears.items() if dmole.towers in ("both", tower)}


def _budget(dmole: DMoLESettings, used: Mapping[str, tuple[str, ...]]) -> int:
    return total_budget(used, fraction=dmole.budget_fraction, unit=dmole.unit)


class SingleAdapter(Method):
    """The mechanics; subclasses say when the adapter starts afresh."""

    def __init__(self, vlm: VisionLanguageModel, settings: MethodSettings, *, seed: int) -> None:
        super().__init__(vlm, settings, seed=seed)
        self.gates = {tower: ExpertGates() for tower in self.candidates}
        self.layers = attach(
            vlm.model,
            self.candidates,
            gates=self.gates,
            dropout=settings.lora.dropout,
            dropout_mode=settings.lora.dropout_mode,
            rows=vlm.rows,
        )
        sizes = {
            tower: {name: self.layers[name].in_features + self.layers[name].out_features for name in names}
            for tower, names in self.candidates.items()
        }
        self.rank = parity_rank(settings.lora.rank, settings.dmole, sizes)
        self.alpha = settings.lora.alpha * self.rank / settings.lora.rank

    @classmethod
    def trained_weights(cls, settings: MethodSettings, sizes: Sizes) -> int:
        rank = parity_rank(settings.lora.rank, settings.dmole, sizes)
        return rank * sum(sum(linears.values()) for linears in sizes.values())

    def check(self, stream: Stream) -> None:
        dmole = self.settings.dmole
        used = _budget_scope(dmole, self.candidates)
        check_budget(used, budget=_budget(dmole, used), unit=dmole.unit, vision_floor=dmole.vision_floor)

    def place_adapter(self, stage: int) -> None:
        """A fresh adapter everywhere (B = 0), replacing the one that is there."""
        generator = derived_generator(self.seed, "adapter", stage)
        remove_expert(self.layers, ADAPTER)
        add_experts(self.layers, self.layers, ADAPTER, rank=self.rank, alpha=self.alpha, generator=generator)

    def begin_stage(self, stage: int, task: Task) -> None:
        self.place_adapter(stage)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return expert_parameters(self.layers, ADAPTER)

    def training_gates(self, batch: Batch) -> AbstractContextManager[None]:
        return self._always_on(batch)

    def evaluation_gates(self, batch: Batch) -> AbstractContextManager[RoutingRecord | None]:
        return self._always_on(batch)

    def _always_on(self, batch: Batch) -> AbstractContextManager[None]:
        gate_S1 = torch.ones(len(batch.samples), 1, device="cpu")
        return experts_on(self.gates, gate_S1, (ADAPTER,), units=batch.units)

    def state(self) -> tuple[dict[str, Tensor], dict[str, JSON]]:
        tensors, description = adapter_state(self.layers)
        return tensors, {"adapters": description}

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, JSON]) -> None:
        load_adapter_state(self.layers, tensors, meta["adapters"])

    def report(self) -> dict[str, JSON]:
        return {"rank": self.rank, "alpha": self.alpha, "adapted_linears": len(self.layers)}
