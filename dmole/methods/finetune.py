# SPDX-License-Identifier: Apache-2.0
"""Finetune: a fresh LoRA per task from the pretrained model, tested on that task only: the upper bound per task.

Its matrix has the diagonal alone, so AVG and BWT are undefined and Last is the mean of the diagonal.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from dmole.methods._single_adapter import SingleAdapter
from dmole.methods.base import Stage

if TYPE_CHECKING:
    from dmole.data.sample import Stream


class Finetune(SingleAdapter):
    """Every stage starts from the base model and is tested on its own task."""

    name: ClassVar[str] = "finetune"

    def stages(self, stream: Stream) -> list[Stage]:
        return [dataclasses.replace(stage, evaluates=(stage.task.name,)) for stage in super().stages(stream)]
