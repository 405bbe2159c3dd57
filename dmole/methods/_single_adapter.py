# SPDX-License-Identifier: Apache-2.0
"""One LoRA on every candidate linear, active for every sample: what Seq-FT, Finetune and Joint share.

    y = W0 x + b + s B A x,   s = lora.alpha / lora.rank

All methods compare at equal trainable parameters: experts of rank r on half of the linears (the budget) train
as many weights as an adapter of rank r / 2 on all of them, exactly so when the linears have equal sizes
(`parity_rank`). The scale s does not change with the rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dmole.files import JSON
from dmole.methods.base import Method, RoutingRecord
from dmole.methods.budget import Sizes, check_budget, linear_sizes, parity_rank
from dmole.methods.settings import MethodSettings
from dmole.models.adapters import (
    adapter_state,
    add_experts,
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


class SingleAdapter(Method):
    """The mechanics; subclasses say when the adapter starts afresh."""

    def __init__(self, vlm: VisionLanguageModel, settings: MethodSettings, *, seed: int) -> None:
        super().__init__(vlm, settings, seed=seed)
        self.adapter = ADAPTER  # the name of the expert that is trained and tested
        self.gates = {tower: ExpertGates() for tower in self.candidates}
        self.layers = self.attached(self.gates)
        self.rank = parity_rank(settings.lora.rank, settings.budget, linear_sizes(vlm.model, self.candidates))
        self.alpha = settings.lora.alpha * self.rank / settings.lora.rank

    @classmethod
    def trained_weights(cls, settings: MethodSettings, sizes: Sizes) -> int:
        rank = parity_rank(settings.lora.rank, settings.budget, sizes)
        return rank * sum(sum(linears.values()) for linears in sizes.values())

    def check(self, stream: Stream) -> None:
        budget = self.settings.budget
        check_budget(self.candidates, budget=budget.of(self.candidates), unit=budget.unit)

    def place_adapter(self, stage: int) -> None:
        """A fresh adapter everywhere (B = 0), replacing the one of that name that is there."""
        generator = derived_generator(self.seed, "adapter", stage)
        remove_expert(self.layers, self.adapter)
        add_experts(self.layers, self.layers, self.adapter, rank=self.rank, alpha=self.alpha, generator=generator)

    def begin_stage(self, stage: int, task: Task) -> None:
        self.place_adapter(stage)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return expert_parameters(self.layers, self.adapter)

    def training_gates(self, batch: Batch) -> AbstractContextManager[None]:
        return self._always_on(batch)

    def evaluation_gates(self, batch: Batch) -> AbstractContextManager[RoutingRecord | None]:
        return self._always_on(batch)

    def _always_on(self, batch: Batch) -> AbstractContextManager[None]:
        gate_S1 = torch.ones(len(batch.samples), 1, device="cpu")
        return experts_on(self.gates, gate_S1, (self.adapter,), units=batch.units)

    def state(self) -> tuple[dict[str, Tensor], dict[str, JSON]]:
        tensors, description = adapter_state(self.layers)
        return tensors, {"adapters": description}

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, JSON]) -> None:
        load_adapter_state(self.layers, tensors, meta["adapters"])

    def report(self) -> dict[str, JSON]:
        return {"rank": self.rank, "alpha": self.alpha, "adapted_linears": len(self.layers)}
