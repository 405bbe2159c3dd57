# SPDX-License-Identifier: Apache-2.0
"""The recipes of the mini benchmark, which `dmole run --recipe` finds by entry point: `mini` and `demo`."""

from __future__ import annotations

from dmole.config import EvaluationSettings, RunConfig
from dmole.methods.dmole.settings import DMoLESettings, RouterSettings
from dmole.methods.settings import LoraSettings
from dmole.training.settings import TrainingSettings


def mini() -> RunConfig:
    """The committed results: five methods, three seeds, the nine tasks, all training and 100 test samples of each.

    Unlike the paper: all linears of both towers are candidates and the rank is 16, for every method alike, because rank
    8 on attention alone is 0.1 M weights on so small a base; and no dropout, whose mask costs as much as the experts do
    with the plain PyTorch backend.
    """
    return RunConfig(
        stream="mini",
        model="mini",
        methods=("zero_shot", "finetune", "joint", "seq_ft", "dmole"),
        seeds=(0, 1, 2),
        lora=LoraSettings(rank=16, alpha=32.0, dropout=0.0),
        training=TrainingSettings(num_train_epochs=2.0, per_device_train_batch_size=16, learning_rate=2e-3, bf16=True),
        evaluation=EvaluationSettings(per_device_eval_batch_size=64, max_new_tokens=32),
        test_samples=100,
        # A hundred epochs make the error a tenth smaller and the router four times as slow.
        options={"dmole": DMoLESettings(router=RouterSettings(epochs=30))},
        output="results/mini",
    )


def demo() -> RunConfig:
    """D-MoLE and Seq-FT, one seed, the same nine tasks with fewer samples; minutes on two cores."""
    return mini().replace(
        methods=("dmole", "seq_ft"),
        seeds=(0,),
        train_samples=500,
        test_samples=60,
        threads=2,
        output="results/demo",
    )
