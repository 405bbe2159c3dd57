# SPDX-License-Identifier: Apache-2.0
"""Whole configurations by name: one function per set of numbers that is published or promised.

dmole run mini --recipe demo       load_config(base=RECIPES["demo"](), overrides=[...])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dmole.config import EvaluationSettings, RunConfig
from dmole.data.sample import Stream
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


def paper(stream: str = "", model: str = "") -> RunConfig:
    """D-MoLE's published set-up (ICML 2025, section 5.1 and appendix A) on a stream and a model of the user's.

    Published for InternVL2-2B on nine data sets (`PUBLISHED`), which `dmole tasks import` makes a stream of; the tasks
    that train five epochs must be called as in `FIVE_EPOCHS` or be named with `training.epochs_of`. The batch is that
    of 8 GPUs with 10 samples each.
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


def coin(stream: str = "", model: str = "") -> RunConfig:
    """CoIN's published set-up (arXiv 2403.08350, and the table of BranchLoRA) on its eight tasks, in its order.

    Published for LLaVA-1.5-7B: rank 128, learning rate 2e-4, one epoch, batch 128, the seven linears of every layer of
    the language model. Unlike CoIN: the attention of the vision tower carries adapters too, because every method here
    chooses among the linears of both towers.
    """
    return RunConfig(
        stream=stream,
        model=model,
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


RECIPES: Mapping[str, Callable[[], RunConfig]] = MappingProxyType(
    {"mini": mini, "demo": mini_small, "paper": paper, "coin": coin}
)


@dataclass(frozen=True)
class Published:
    """A task as it was published: its metric, and how many samples it had; None where no number is published."""

    metric: str
    train: int | None = None
    test: int | None = None


# By recipe, the tasks that its numbers were published on, in their order; `dmole run --dry-run` compares.
PUBLISHED: Mapping[str, Mapping[str, Published]] = MappingProxyType(
    {
        "paper": {
            "vizwiz_caption": Published("cider", 117_155, 7_750),
            "sk_vg": Published("iou", 23_404, 6_598),
            "textcaps": Published("cider", 109_765, 3_166),
            "iconqa": Published("option_letter", 18_946, 6_315),
            "ocr_vqa": Published("exact_match", 166_043, 100_037),
            "flickr30k": Published("cider", 145_000, 1_000),
            "vizwiz_vqa": Published("vqa", 20_523, 4_319),
            "kvqa": Published("exact_match", 146_408, 24_294),
            "pmc_vqa": Published("option_letter", 176_948, 2_000),
        },
        # Its own scripts score VizWiz and VQAv2 by one answer, and TextVQA by ten annotators.
        "coin": {
            "ScienceQA": Published("exact_match"),
            "TextVQA": Published("exact_match"),
            "ImageNet": Published("exact_match"),
            "GQA": Published("exact_match"),
            "VizWiz": Published("exact_match"),
            "Grounding": Published("iou"),
            "VQAv2": Published("exact_match"),
            "OCRVQA": Published("exact_match"),
        },
    }
)


def layout_findings(recipe: str | None, stream: Stream) -> list[str]:
    """How `stream` differs from what a recipe's numbers were published on; [] for other recipes."""
    published = PUBLISHED.get(recipe or "", {})
    lines = [f"recipe {recipe}: the task {name} is missing" for name in published if name not in stream.task_names]
    for task in stream.tasks if published else ():
        if task.name not in published:
            lines.append(f"recipe {recipe}: {task.name} is none of its tasks ({', '.join(published)})")
            continue
        asked = published[task.name]
        if task.metric != asked.metric:
            lines.append(f"recipe {recipe}: {task.name} has the metric {task.metric}; published with {asked.metric}")
        for split, count in (("train", asked.train), ("test", asked.test)):
            if count is not None and len(getattr(task, split)) != count:
                found = len(getattr(task, split))
                lines.append(f"recipe {recipe}: {task.name} has {found:,} {split} samples; published with {count:,}")
    if not lines and stream.task_names != tuple(published):
        lines.append(f"recipe {recipe}: the order is {', '.join(stream.task_names)}; published {', '.join(published)}")
    return lines if published else []
