# SPDX-License-Identifier: Apache-2.0
"""Seq-FT: one LoRA through the sequence of tasks, nothing against forgetting.

`continue` trains the same adapter on; `merge_and_restart`, what D-MoLE's public code ships, adds s B A to the base
weights after each task and starts a fresh adapter, so the model's total update may have a higher rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dmole.files import JSON
from dmole.methods._single_adapter import ADAPTER, SingleAdapter
from dmole.methods.settings import MethodSettings
from dmole.models.adapters import remove_expert

if TYPE_CHECKING:
    from dmole.data.sample import Task
    from dmole.models.vision_language import VisionLanguageModel


@dataclass(frozen=True, kw_only=True)
class SeqFtOptions:
    """Seq-FT: one adapter through the sequence of tasks."""

    # Train one adapter on through all tasks, or add it to the base weights after each and start a fresh one.
    mode: Literal["continue", "merge_and_restart"] = "continue"


class SeqFt(SingleAdapter):
    """The adapter of one task is where the next one starts."""

    name: ClassVar[str] = "seq_ft"
    Options: ClassVar[type[Any]] = SeqFtOptions

    def __init__(self, vlm: VisionLanguageModel, settings: MethodSettings, *, seed: int) -> None:
        super().__init__(vlm, settings, seed=seed)
        self.mode = settings.options_as(SeqFtOptions).mode

    def begin_stage(self, stage: int, task: Task) -> None:
        if stage == 1 or self.mode == "merge_and_restart":
            self.place_adapter(stage)

    def end_stage(self, stage: int, task: Task) -> None:
        if self.mode == "continue":
            return
        with torch.no_grad():
            for layer in self.layers.values():
                pair = dict(layer.bank.named_parameters())
                a, b = pair[f"experts.{ADAPTER}.lora_a"], pair[f"experts.{ADAPTER}.lora_b"]
                update = layer.bank.scale(ADAPTER) * (b @ a)
                # Not in place: other runs share the pretrained weights.
                layer.base.weight = nn.Parameter(layer.base.weight + update.to(layer.base.weight.dtype), False)
        remove_expert(self.layers, ADAPTER)

    def state(self) -> tuple[dict[str, Tensor], dict[str, JSON]]:
        tensors, meta = super().state()
        if self.mode == "merge_and_restart":
            tensors.update({f"merged/{name}": layer.base.weight.detach() for name, layer in self.layers.items()})
        return tensors, meta

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, JSON]) -> None:
        own = {name: value for name, value in tensors.items() if not name.startswith("merged/")}
        super().load_state(own, meta)
        with torch.no_grad():
            for name, layer in self.layers.items():
                if f"merged/{name}" in tensors:
                    layer.base.weight = nn.Parameter(tensors[f"merged/{name}"].to(layer.base.weight), False)

    def report(self) -> dict[str, JSON]:
        return {**super().report(), "mode": self.mode}
