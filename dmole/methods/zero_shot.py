# SPDX-License-Identifier: Apache-2.0
"""Zero-shot: the pretrained model as it is. It has no stage; the run keeps row 0 of the matrix only."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from dmole.files import JSON
from dmole.methods.base import Method, RoutingRecord, Sizes, Stage
from dmole.methods.settings import MethodSettings

if TYPE_CHECKING:
    from dmole.data.collate import Batch
    from dmole.data.sample import Stream, Task


class ZeroShot(Method):
    """Nothing is trained and nothing is added."""

    name: ClassVar[str] = "zero_shot"

    @classmethod
    def trained_weights(cls, settings: MethodSettings, sizes: Sizes) -> int:
        return 0

    def stages(self, stream: Stream) -> list[Stage]:
        return []

    def begin_stage(self, stage: int, task: Task) -> None:
        raise ValueError(f"zero_shot was asked to train stage {stage} ({task.name}); it has no stages.")

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return {}

    def training_gates(self, batch: Batch) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def evaluation_gates(self, batch: Batch) -> AbstractContextManager[RoutingRecord | None]:
        return contextlib.nullcontext()

    def state(self) -> tuple[dict[str, Tensor], dict[str, JSON]]:
        return {}, {}

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, JSON]) -> None:
        if tensors or meta:
            raise ValueError(f"zero_shot got a state with {sorted(tensors) + sorted(meta)}; expected none.")
