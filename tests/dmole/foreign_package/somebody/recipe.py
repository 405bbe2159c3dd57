# SPDX-License-Identifier: Apache-2.0
"""A run of seconds over the stream `shades`."""

from __future__ import annotations

from dmole.config import EvaluationSettings, RunConfig
from dmole.methods.settings import LoraSettings
from dmole.training.settings import TrainingSettings
from somebody.method import EveryNthOptions


def shades_quickly() -> RunConfig:
    return RunConfig(
        stream="shades",
        model="tiny",
        methods=("every_nth", "seq_ft"),
        lora=LoraSettings(rank=4, dropout=0.0),
        training=TrainingSettings(num_train_epochs=1.0, per_device_train_batch_size=4),
        evaluation=EvaluationSettings(max_new_tokens=12),
        options={"every_nth": EveryNthOptions(n=3)},
    )
