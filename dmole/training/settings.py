# SPDX-License-Identifier: Apache-2.0
"""`training:` of a configuration, with the names of `transformers.TrainingArguments`.

    training:
      num_train_epochs: 2
      per_device_train_batch_size: 16
      learning_rate: 1.0e-3
      bf16: true

Three names are not TrainingArguments' own: `epochs_of`, which continual learning needs, and
`early_stopping_patience` and `early_stopping_threshold`, which transformers has in `EarlyStoppingCallback`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

from dmole.config_error import ConfigError, require

OWN_NAMES = ("epochs_of", "early_stopping_patience", "early_stopping_threshold")

# Names of earlier versions of this package and of transformers.
RENAMED: Mapping[str, str] = MappingProxyType(
    {
        "epochs": "num_train_epochs",
        "batch_size": "per_device_train_batch_size",
        "per_gpu_train_batch_size": "per_device_train_batch_size",
        "warmup": "warmup_steps (a number below 1 is a share of the steps)",
        "warmup_ratio": "warmup_steps (a number below 1 is a share of the steps)",
        "gradient_checkpointing": "activation_checkpointing",
        "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
        "evaluation_strategy": "eval_strategy",
        "checkpoint_every_steps": "save_steps (save_strategy: 'no' keeps the ends of stages alone)",
    }
)

# Settings of TrainingArguments that cannot be had here, and why.
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "label_smoothing_factor": "The loss is the model's own cross-entropy, which has no smoothing.",
        "seed": "Seeds belong to the run: set 'seeds'.",
        "output_dir": "Set 'output'.",
        "deepspeed": "DeepSpeed engines are not supported; use fsdp.",
    }
)

# Settings that change no number of a run, only what is written, when, and how fast: no part of its fingerprint.
WITHOUT_EFFECT = ("logging_steps", "report_to", "save_strategy", "save_steps", "dataloader_num_workers")

# The names of transformers.SchedulerType without "reduce_lr_on_plateau" and "greedy": those ask for a measured loss,
# so that their rates do not follow from the step.
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How each stage trains. Trainable weights, optimizer and loss are float32 whatever the precision."""

    # How often each stage sees its samples; fractions are allowed.
    num_train_epochs: float = 3.0
    # Tasks that train longer than the others (D-MoLE: SK-VG, VizWiz-VQA and IconQA take 5 epochs, the rest 1).
    epochs_of: Mapping[str, float] = field(default_factory=dict)
    # An optimizer step sees per_device_train_batch_size * gradient_accumulation_steps * processes samples.
    per_device_train_batch_size: int = 16
    # Samples in a batch of the validation loss.
    per_device_eval_batch_size: int = 16
    # Batches whose gradients are added up before an optimizer step.
    gradient_accumulation_steps: int = 1
    # The optimizer, one of torch.optim.
    optim: Literal["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop"] = "adamw_torch_fused"
    # The highest learning rate of the schedule.
    learning_rate: float = 1e-3
    # The schedule of transformers.get_scheduler.
    lr_scheduler_type: Schedule = "cosine"
    # What the schedule takes besides steps.
    lr_scheduler_kwargs: Mapping[str, Any] = field(default_factory=dict)
    # Steps of linear warm-up; a number below 1 is a share of the stage's steps.
    warmup_steps: float = 0.03
    # Decoupled weight decay of AdamW, an L2 penalty of the other optimizers.
    weight_decay: float = 0.01
    # Decay of AdamW's mean of the gradients.
    adam_beta1: float = 0.9
    # Decay of AdamW's mean of the squared gradients.
    adam_beta2: float = 0.999
    # Added to the root in the denominator of AdamW.
    adam_epsilon: float = 1e-8
    # Largest gradient norm; 0 leaves gradients as they are.
    max_grad_norm: float = 1.0
    # Autocast of the forward pass to bfloat16.
    bf16: bool = False
    # Autocast of the forward pass to float16 with a scaled loss; not on a CPU.
    fp16: bool = False
    # Recompute the activations of every layer during backward: less memory for about a third more time.
    activation_checkpointing: bool = False
    # Arguments of torch.utils.checkpoint, such as use_reentrant.
    activation_checkpointing_kwargs: Mapping[str, Any] = field(default_factory=dict)
    # Spread the base's layers over the processes with torch's fully_shard; experts stay whole in each.
    fsdp: bool = False
    # When the loss on the stage's validation samples is measured.
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    # Steps between two validations; below 1: a share of the stage's steps.
    eval_steps: float | None = None
    # The weights with the lowest validation loss are those that a stage ends with.
    load_best_model_at_end: bool = False
    # Validations without a better loss after which a stage stops; 0 never stops early.
    early_stopping_patience: int = 0
    # How much lower a validation loss has to be to count as better.
    early_stopping_threshold: float = 0.0
    # Steps between two entries of the trackers.
    logging_steps: float = 10.0
    # Trackers of accelerate, such as [tensorboard, wandb]; null: TensorBoard where it is installed; none: none.
    report_to: tuple[str, ...] | None = None
    # When a checkpoint inside a stage is saved; "no" saves at the ends of stages alone.
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    # Steps between two checkpoints; below 1: a share of the stage's steps.
    save_steps: float = 200.0
    # Processes that prepare batches ahead; 0 prepares the next step in a thread.
    dataloader_num_workers: int = 0

    @property
    def precision(self) -> Literal["no", "bf16", "fp16"]:
        """accelerate's name of the mixed precision."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "no"

    def __post_init__(self) -> None:
        def check(name: str, good: bool, expected: str) -> None:
            require(good, f"training.{name}", getattr(self, name), expected)

        check("num_train_epochs", self.num_train_epochs > 0, "a number above 0")
        for name, epochs in self.epochs_of.items():
            require(epochs > 0, f"training.epochs_of.{name}", epochs, "a number above 0")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            check(name, getattr(self, name) >= 1, "an integer of at least 1")
        check("learning_rate", self.learning_rate > 0, "a number above 0")
        names = get_args(Schedule)
        check("lr_scheduler_type", self.lr_scheduler_type in names, f"one of {', '.join(names)}")
        check("warmup_steps", self.warmup_steps >= 0, "a number of steps, or a share of them in [0, 1)")
        for name in ("weight_decay", "early_stopping_patience", "early_stopping_threshold", "dataloader_num_workers"):
            check(name, getattr(self, name) >= 0, "a number of at least 0")
        for name in ("adam_beta1", "adam_beta2"):
            check(name, 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        check("adam_epsilon", self.adam_epsilon > 0, "a number above 0")
        check("max_grad_norm", self.max_grad_norm >= 0, "0 (no clipping) or above")
        check("fp16", not (self.bf16 and self.fp16), "false beside bf16: true. Choose one precision")
        check("eval_steps", self.eval_steps is None or self.eval_steps > 0, "null (as logging_steps) or above 0")
        for name in ("load_best_model_at_end", "early_stopping_patience"):
            check(name, not getattr(self, name) or self.eval_strategy != "no", "eval_strategy 'steps' or 'epoch'")
        for name in ("logging_steps", "save_steps"):
            check(name, getattr(self, name) > 0, "a number above 0")

    @classmethod
    def unknown(cls, key: str, path: str) -> ConfigError | None:
        """The error for a key that is not ours but that has a meaning elsewhere; None for any other."""
        if key in RENAMED:
            return ConfigError(f"unknown key {path!r}: it is now called training.{RENAMED[key]}. Rename it.")
        if key in REFUSED:
            return ConfigError(f"{path} is not supported. {REFUSED[key]} Leave it out.")
        from transformers import TrainingArguments

        if key in {spec.name for spec in dataclasses.fields(TrainingArguments)}:
            return ConfigError(
                f"{path} is a setting of transformers' TrainingArguments that this loop does not have; expected one "
                f"of {', '.join(spec.name for spec in dataclasses.fields(cls))}. Leave it out."
            )
        return None

    def epochs(self, task: str) -> float:
        """How many epochs the task called `task` trains."""
        return self.epochs_of.get(task, self.num_train_epochs)

    def count(self, name: str, total: int) -> int:
        """`warmup_steps`, `eval_steps`, `logging_steps` or `save_steps` of a stage of `total` steps.

        Below 1 they are shares of it, rounded up, as in TrainingArguments.
        """
        value = self.logging_steps if name == "eval_steps" and self.eval_steps is None else getattr(self, name)
        return math.ceil(total * value) if value < 1 else int(value)
