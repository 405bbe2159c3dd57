# SPDX-License-Identifier: Apache-2.0
"""Whole configurations by name: one function per set of numbers that is published or promised.

dmole run mini --recipe demo       load_config(base=RECIPES["demo"](), overrides=[...])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from dmole.config import EvaluationSettings, RunConfig
from dmole.methods.dmole.settings import DMoLESettings, RouterSettings
from dmole.methods.settings import LoraSettings
from dmole.training.settings import TrainingSettings

# Attention projections of both towers, under the names that transformers' model families give them.
ATTENTION = r"\.(q_proj|k_proj|v_proj|o_proj|out_proj|qkv|qkv_proj|proj|projection_layer)$"
# D-MoLE's data sets that are trained for five epochs; all others for one.
FIVE_EPOCHS = ("sk_vg", "vizwiz_vqa", "iconqa")


def mini() -> RunConfig:
    """The committed results: every method, three seeds, the nine tasks, all training and 100 test samples of each.

    Unlike the paper: all linears of both towers are candidates and the rank is 16, for every method alike, because rank
    8 on attention alone is 0.1 M weights on so small a base; and no dropout, whose mask costs as much as the experts do
    with the plain PyTorch backend.
    """
    return RunConfig(
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


def mini_small() -> RunConfig:
    """The demo: D-MoLE and Seq-FT, one seed, the same nine tasks with fewer samples; minutes on two cores."""
    return mini().replace(
        methods=("dmole", "seq_ft"),
        seeds=(0,),
        train_samples=500,
        test_samples=60,
        threads=2,
        output="results/demo",
    )


def paper(stream: str, model: str) -> RunConfig:
    """D-MoLE's published set-up (ICML 2025, section 5.1 and appendix A) on a stream and a model of the user's.

    Published for InternVL2-2B on nine data sets; the tasks that train five epochs must be called as in `FIVE_EPOCHS`
    or be named with `training.epochs_of`. The batch is that of 8 GPUs with 10 samples each.
    """
    return RunConfig(
        stream=stream,
        model=model,
        methods=("zero_shot", "finetune", "joint", "seq_ft", "dmole"),
        lora=LoraSettings(rank=8, alpha=16.0, dropout=0.05, dropout_mode="per_expert"),
        candidates=ATTENTION,
        training=TrainingSettings(
            num_train_epochs=1.0,
            epochs_of=dict.fromkeys(FIVE_EPOCHS, 5.0),
            per_device_train_batch_size=80,
            learning_rate=1e-4,
            warmup_steps=0.03,
            weight_decay=0.01,
        ),
        options={"dmole": DMoLESettings(budget_fraction=0.5, router=RouterSettings(epochs=100, learning_rate=1e-3))},
        output="results/paper",
    )


RECIPES: Mapping[str, Callable[[], RunConfig]] = MappingProxyType({"mini": mini, "demo": mini_small})
