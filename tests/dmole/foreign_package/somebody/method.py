# SPDX-License-Identifier: Apache-2.0
"""One adapter on every n-th candidate linear, trained on through all tasks, at the rank that the budget allows."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dmole.data.collate import Batch
from dmole.data.sample import Task
from dmole.methods import Method
from dmole.methods.base import RoutingRecord
from dmole.methods.budget import Sizes, linear_sizes
from dmole.methods.settings import MethodSettings
from dmole.models.adapters import (
    adapter_state,
    add_experts,
    attach,
    expert_parameters,
    experts_on,
    load_adapter_state,
)
from dmole.models.vision_language import VisionLanguageModel
from dmole.seeding import derived_generator
from dmole_kernels import ExpertGates


@dataclass(frozen=True, kw_only=True)
class EveryNthOptions:
    """Every n-th candidate linear."""

    # Which linears carry the adapter: 1 is all of them.
    n: int = 2


class EveryNth(Method):
    """The same adapter for every task."""

    name: ClassVar[str] = "every_nth"
    Options: ClassVar[type[Any]] = EveryNthOptions

    def __init__(self, vlm: VisionLanguageModel, settings: MethodSettings, *, seed: int) -> None:
        super().__init__(vlm, settings, seed=seed)
        step = settings.options_as(EveryNthOptions).n
        self.rank = self._rank(settings, linear_sizes(vlm.model, self.candidates))
        chosen = {tower: names[::step] for tower, names in self.candidates.items()}
        self.gates = {tower: ExpertGates() for tower in chosen}
        self.layers = attach(vlm.model, chosen, gates=self.gates, rows=vlm.rows)

    @classmethod
    def _rank(cls, settings: MethodSettings, sizes: Sizes) -> int:
        step = settings.options_as(EveryNthOptions).n
        used = sum(size for linears in sizes.values() for size in list(linears.values())[::step])
        return max(1, round(settings.budget.weights(settings.lora.rank, sizes) / used))

    @classmethod
    def trained_weights(cls, settings: MethodSettings, sizes: Sizes) -> int:
        step = settings.options_as(EveryNthOptions).n
        used = sum(size for linears in sizes.values() for size in list(linears.values())[::step])
        return cls._rank(settings, sizes) * used

    def begin_stage(self, stage: int, task: Task) -> None:
        if stage == 1:
            generator = derived_generator(self.seed, "every_nth", stage)
            add_experts(self.layers, self.layers, "one", rank=self.rank, alpha=2.0 * self.rank, generator=generator)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return expert_parameters(self.layers, "one")

    def _on(self, batch: Batch) -> AbstractContextManager[None]:
        return experts_on(self.gates, torch.ones(len(batch.samples), 1), ("one",), units=batch.units)

    def training_gates(self, batch: Batch) -> AbstractContextManager[None]:
        return self._on(batch)

    def evaluation_gates(self, batch: Batch) -> AbstractContextManager[RoutingRecord | None]:
        return self._on(batch)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, description = adapter_state(self.layers)
        return tensors, {"adapters": description}

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        load_adapter_state(self.layers, tensors, meta["adapters"])

    def columns(self) -> dict[str, float | int | str | None]:
        return {"linears": len(self.layers)}
