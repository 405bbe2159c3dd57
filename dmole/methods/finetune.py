# SPDX-License-Identifier: Apache-2.0
"""Finetune: a fresh LoRA per task from the pretrained model, tested on that task only: the upper bound per task.

Its matrix has the diagonal alone, so AVG and BWT are undefined and Last is the mean of the diagonal. The adapters
of all tasks are kept; callers of the trained model name the task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from dmole.files import JSON
from dmole.methods._single_adapter import ADAPTER, SingleAdapter
from dmole.methods.base import RoutingRecord, Stage
from dmole.models.adapters import expert_name, freeze_expert, remove_expert, task_experts_on

if TYPE_CHECKING:
    from dmole.data.collate import Batch
    from dmole.data.sample import Stream, Task
    from dmole.methods.settings import MethodSettings
    from dmole.models.vision_language import VisionLanguageModel


class Finetune(SingleAdapter):
    """Every stage starts from the base model and is tested on its own task."""

    name: ClassVar[str] = "finetune"
    routed_by = "caller"

    def __init__(self, vlm: VisionLanguageModel, settings: MethodSettings, *, seed: int) -> None:
        super().__init__(vlm, settings, seed=seed)
        self.experts: dict[str, str] = {}

    def stages(self, stream: Stream) -> list[Stage]:
        return [dataclasses.replace(stage, evaluates=(stage.task.name,)) for stage in super().stages(stream)]

    def begin_stage(self, stage: int, task: Task) -> None:
        self.adapter = self.experts[task.name] = expert_name(stage, task.name)
        super().begin_stage(stage, task)

    def end_stage(self, stage: int, task: Task) -> None:
        freeze_expert(self.layers, self.adapter)

    def routes(self, batch: Batch) -> RoutingRecord | None:
        raise ValueError(
            f"task: got none for a model of {self.name}, which has one adapter per task and no router; expected one of "
            f"{', '.join(self.experts)}. Pass task=."
        )

    def task_gates(self, batch: Batch, tasks: Sequence[Sequence[str]]) -> AbstractContextManager[None]:
        unknown = sorted({name for names in tasks for name in names} - set(self.experts))
        if unknown:
            raise ValueError(f"tasks: got {unknown[0]!r}; expected one of {', '.join(self.experts)}.")
        return task_experts_on(self.gates, self.experts, tasks, units=batch.units)

    def task_experts(self) -> dict[str, str]:
        return dict(self.experts)

    def forget(self, task: str, *, keep_weights: bool = False) -> None:
        if task not in self.experts:
            raise ValueError(f"task: got {task!r}; expected one of {', '.join(self.experts)}.")
        expert = self.experts.pop(task)
        if not keep_weights:
            remove_expert(self.layers, expert)

    def state(self) -> tuple[dict[str, Tensor], dict[str, JSON]]:
        tensors, meta = super().state()
        return tensors, {**meta, "experts": dict(self.experts)}

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, JSON]) -> None:
        super().load_state(tensors, meta)
        self.experts = dict(meta["experts"])
        self.adapter = list(self.experts.values())[-1] if self.experts else ADAPTER
