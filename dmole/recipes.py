# SPDX-License-Identifier: Apache-2.0
"""Whole configurations by name: one function per set of numbers that is published or promised.

    dmole run my_stream --model my_model --recipe paper       load_config(base=RECIPES["paper"](), overrides=[...])

Every one is an entry point of the group `dmole.recipes`, ours too. A recipe lists its methods itself, so that a new
method is part of none; `stream`, `model` and `methods` that it leaves empty are the user's to give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint

from dmole.config import RunConfig
from dmole.methods.budget import BudgetSettings
from dmole.methods.dmole.settings import DMoLESettings, RouterSettings
from dmole.methods.seq_ft import SeqFtOptions
from dmole.methods.settings import LoraSettings
from dmole.registry import Registry, called, wrong
from dmole.training.settings import TrainingSettings

# Attention projections of both towers, under the names that transformers' model families give them.
ATTENTION = r"\.(q_proj|k_proj|v_proj|o_proj|out_proj|qkv|qkv_proj|proj|projection_layer)$"
# D-MoLE's data sets that are trained for five epochs; all others for one.
FIVE_EPOCHS = ("sk_vg", "vizwiz_vqa", "iconqa")


def paper() -> RunConfig:
    """D-MoLE's published set-up (ICML 2025, section 5.1 and appendix A) for a stream and a model of the user's.

    Published for InternVL2-2B on nine data sets (`PUBLISHED`), which `dmole tasks import` makes a stream of; the tasks
    that train five epochs must be called as in `FIVE_EPOCHS` or be named with `training.epochs_of`. The batch is that
    of 8 GPUs with 10 samples each.
    """
    return RunConfig(
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
        budget=BudgetSettings(fraction=0.5),
        options={"dmole": DMoLESettings(router=RouterSettings(epochs=100, learning_rate=1e-3))},
        output="results/paper",
    )


def released_code() -> RunConfig:
    """`paper` with what D-MoLE's public code does where it differs from the text.

    Sums of the layers' norms, a quarter of the budget for the vision tower, a batch that votes for its experts in
    training and at test, longer and earlier stopped autoencoders, and a Seq-FT that adds its adapter to the base after
    each task. The public code computes no thresholds; ours are kept.
    """
    router = RouterSettings(epochs=1000, learning_rate=5e-3, final_learning_rate=1e-3, batch_size=1024, patience=10)
    dmole = DMoLESettings(
        score_aggregation="sum",
        vision_floor=0.25,
        routing="batch_vote",
        training_neighbour="batch_vote",
        router=router,
    )
    return paper().replace(
        options={"dmole": dmole, "seq_ft": SeqFtOptions(mode="merge_and_restart")}, output="results/released_code"
    )


def coin() -> RunConfig:
    """CoIN's published set-up (arXiv 2403.08350, and the table of BranchLoRA) on its eight tasks, in its order.

    Published for LLaVA-1.5-7B: rank 128, learning rate 2e-4, one epoch, batch 128, the seven linears of every layer of
    the language model. Unlike CoIN: the attention of the vision tower carries adapters too, because every method here
    chooses among the linears of both towers.
    """
    return RunConfig(
        methods=("zero_shot", "finetune", "joint", "seq_ft", "dmole"),
        lora=LoraSettings(rank=128, alpha=256.0, dropout=0.05, dropout_mode="per_expert"),
        candidates=r"\.([qkvo]_proj|out_proj|gate_proj|up_proj|down_proj)$",
        training=TrainingSettings(
            num_train_epochs=1.0,
            per_device_train_batch_size=128,
            learning_rate=2e-4,
            warmup_steps=0.03,
            weight_decay=0.0,
        ),
        output="results/coin",
    )


def _checked(point: EntryPoint, value: object) -> Callable[[], RunConfig]:
    made = called(point, value)

    def recipe() -> RunConfig:
        config = made()
        if not isinstance(config, RunConfig):
            raise wrong(point, f"which returns a {type(config).__name__}", "a RunConfig")
        return config

    return recipe


RECIPES: Mapping[str, Callable[[], RunConfig]] = Registry[Callable[[], RunConfig]]("dmole.recipes", check=_checked)
