# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer with gated experts: each row trains its own task's expert; checkpoints hold experts only.

    python examples/trainer_with_gates.py

`GatedTrainer` is all that is needed: it opens the gates around forward AND backward (gradient checkpointing runs the
layers again during backward), writes the experts as stock PEFT folders instead of the model, and reads them back in
place, so that the optimizer of a resumed run keeps its parameters.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dmole_kernels import ExpertHandle, convert, load_experts, save_experts

TASKS = ["up", "down"]


class Counting(Dataset[dict[str, Tensor]]):
    """Rows that count up or down from a random number; the first token alone cannot tell which."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        first = torch.randint(0, 32, (), generator=torch.Generator().manual_seed(index))
        task = index % 2
        ids = (first + (1 - 2 * task) * torch.arange(6)) % 32
        return {"input_ids": ids, "labels": ids, "task": torch.tensor(task)}


class GatedTrainer(Trainer):
    """A Trainer whose rows have a column `task`, the position of their expert in `tasks`."""

    def __init__(self, experts: ExpertHandle, tasks: list[str], **settings: Any) -> None:
        super().__init__(**settings)
        self.experts, self.tasks = experts, tasks

    def _gates(self, inputs: dict[str, Any]) -> Any:
        gate = nn.functional.one_hot(inputs.pop("task"), len(self.tasks)).float()
        return self.experts.use(gate, self.tasks, units=1)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> Tensor:
        inputs = dict(inputs)
        with self._gates(inputs):
            return super().training_step(model, inputs, *arguments, **keywords)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
        inputs = dict(inputs)
        with self._gates(inputs):
            return super().prediction_step(model, inputs, *arguments, **keywords)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        save_experts(self.experts, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_experts(self.experts, resume_from_checkpoint)


def trainer(folder: str | Path, **changes: Any) -> GatedTrainer:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.1, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    experts = convert(model)
    for task in TASKS:
        experts.add(task, rank=4, alpha=8.0)
    # The inputs of the first layer carry the gradient through a checkpointed frozen model.
    model.enable_input_require_grads()
    settings: dict[str, Any] = dict(
        output_dir=str(folder), max_steps=24, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        learning_rate=1e-2, save_steps=12, logging_steps=6, activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": False}, remove_unused_columns=False, report_to="none",
        use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    settings |= changes
    return GatedTrainer(
        experts=experts, tasks=TASKS, model=model, args=TrainingArguments(**settings), train_dataset=Counting()
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        first = trainer(folder)
        loss = first.train().training_loss
        print(f"mean loss {loss:.2f}")
        print("a checkpoint holds", sorted(p.name for p in Path(folder, "checkpoint-12").iterdir()))
        # A process that starts anew goes on from step 12 and ends with the same experts, bit for bit.
        resumed = trainer(folder)
        resumed.train(resume_from_checkpoint=str(Path(folder, "checkpoint-12")))
        pairs = zip(first.experts.parameters(), resumed.experts.parameters(), strict=True)
        print("resumed equals uninterrupted:", all(torch.equal(one, two) for one, two in pairs))


if __name__ == "__main__":
    main()
