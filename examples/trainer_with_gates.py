# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer with one expert per task; checkpoints hold the experts, not the base model. No downloads.

Each row of the data names its task. `GatedTrainer` opens the gates around a whole step, so that layers which gradient
checkpointing runs again during backward find them too. A run that was stopped goes on to the same numbers.

    python examples/trainer_with_gates.py [folder]
    torchrun --standalone --nproc-per-node 2 examples/trainer_with_gates.py folder          DDP
"""

import gc
import sys
import tempfile
from typing import Any

import torch
from accelerate import PartialState
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from dmole_kernels import ExpertHandle, convert, experts_of, load_experts, save_experts

TASKS = ["up", "down"]


class GatedTrainer(Trainer):
    """Rows with a column "task" (an index into TASKS) train, and are evaluated with, the expert of that task."""

    def gates(self, inputs: dict[str, Any]) -> Any:
        gate = torch.eye(len(TASKS))[inputs.pop("task").cpu()]  # [samples, experts]
        return experts_of(self.model).use(gate, TASKS)  # a vision tower: units=inputs.pop("images_per_sample")

    def training_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> torch.Tensor:
        with self.gates(inputs):  # forward AND backward
            return super().training_step(model, inputs, *arguments, **keywords)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
        with self.gates(inputs):
            return super().prediction_step(model, inputs, *arguments, **keywords)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            save_experts(self.model, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_experts(self.model, resume_from_checkpoint)  # in place: an optimizer keeps its Parameters

    def _load_best_model(self) -> None:
        load_experts(self.model, self.state.best_model_checkpoint)


def build_model() -> tuple[LlamaForCausalLM, ExpertHandle]:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    experts = convert(model, dropout=0.05)  # freezes the base
    experts.add("up", rank=8)
    experts.add("down", rank=4)
    model.enable_input_require_grads()  # reentrant checkpointing gives no gradients behind a frozen embedding
    return model, experts


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Numbers that count up (task 0) or down (task 1): only the right expert can tell which."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, 32, (count,), generator=generator).tolist()
    data = []
    for i, start in enumerate(starts):
        numbers = [(start + (1 - 2 * (i % 2)) * k) % 32 for k in range(6)]
        data.append({"input_ids": numbers, "labels": numbers, "task": i % 2})
    return data


def arguments(folder: str, **others: Any) -> TrainingArguments:
    # In transformers before 5.23 the two are called gradient_checkpointing and gradient_checkpointing_kwargs.
    settings: dict[str, Any] = dict(
        output_dir=folder, max_steps=40, per_device_train_batch_size=16, gradient_accumulation_steps=2,
        activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=1e-2, save_steps=20, logging_steps=20, report_to="none", disable_tqdm=True, use_cpu=True,
        remove_unused_columns=False,  # keep "task"
        ddp_find_unused_parameters=True,  # several processes: a rank need not use every expert
    )  # fmt: skip
    return TrainingArguments(**{**settings, **others})


def main(folder: str) -> None:
    model, _ = build_model()
    trainer = GatedTrainer(model, arguments(folder), train_dataset=rows(512, 1), eval_dataset=rows(64, 2))
    trainer.train()
    print(f"evaluation loss {trainer.evaluate()['eval_loss']:.2f}")

    # A new process that goes on from step 20: checkpoint-20/ holds up/, down/ and the state of optimizer and Trainer.
    resumed, _ = build_model()
    GatedTrainer(resumed, arguments(folder), train_dataset=rows(512, 1)).train(
        resume_from_checkpoint=f"{folder}/checkpoint-20"
    )
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    print(f"resumed at step 20, the same experts bit for bit: {same}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(temporary)
    gc.collect()  # DDP's wrappers, which hold the process group
    PartialState().destroy_process_group()
