# SPDX-License-Identifier: Apache-2.0
"""What each process does in test_processes.py; started with torchrun, or imported for the numbers of one process."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from dmole.config import load_config
from dmole.data.reading import read_stream
from dmole.methods import method_class
from dmole.methods.base import answer_loss
from dmole.methods.dmole.allocation import layer_scores
from dmole.methods.dmole.settings import DMoLESettings, RouterSettings
from dmole.methods.settings import LoraSettings, MethodSettings
from dmole.profile import Profile
from dmole.runs.evaluation import evaluate, generation_queue
from dmole.runs.runner import run
from dmole.runs.single_run import SingleRun
from dmole.training.acceleration import make_accelerator, set_random_state, sum_gradients
from dmole.training.processes import process, shard
from dmole.training.settings import TrainingSettings
from dmole.training.stage_training import StageTraining
from mini_cmit.model.tiny import build_tiny_model

GLOBAL_BATCH = 4


def settings(processes: int, **changes: Any) -> TrainingSettings:
    return TrainingSettings(
        num_train_epochs=20 / 3,  # 10 samples in windows of 4: 20 steps
        per_device_train_batch_size=GLOBAL_BATCH // processes,
        per_device_eval_batch_size=2,
        eval_strategy="steps",
        eval_steps=7,
        **changes,
    )


def numbers(folder: Path, method_name: str, *, sharded: bool = False, **changes: Any) -> dict[str, Any]:
    """Second stage of a method on the toy stream: proxy, features, first gradients, 20 losses, predictions."""
    stream = read_stream(folder)
    chosen = settings(process()[1], fsdp=sharded, **changes)
    model = build_tiny_model(0)
    if sharded:
        shard(model.model, "cpu")
    # The neighbour's expert is active for some samples only: processes use different experts.
    options = DMoLESettings(proxy_min_samples=10, proxy_batch_size=4, router=RouterSettings(epochs=3, margin=50.0,
                            feature_batch_size=4))  # fmt: skip
    given = MethodSettings(lora=LoraSettings(rank=4, dropout=0.0), options=options if method_name == "dmole" else None)
    method = method_class(method_name)(model, given, seed=3)
    found: dict[str, Any] = {}
    scores = layer_scores(model, stream.tasks[0].train, loss=answer_loss, batch_size=4)
    found["scores"] = torch.tensor([score for tower in scores.values() for score in tower.values()])
    stages = method.stages(stream)
    generator = torch.Generator().manual_seed(5)
    for stage in stages[:2]:
        method.begin_stage(stage.index, stage.task)
        with torch.no_grad():
            for parameter in method.trainable_parameters().values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        if stage.index == 2 and method_name == "dmole":
            memory = method._stage  # type: ignore[attr-defined]
            # A neighbour for every other sample, so that the first process has some and the second others.
            memory.neighbour_N.copy_(torch.where(torch.arange(len(memory.ids)) % 2 == 0, 0, -1))
            found["features"] = memory.features_ND
        if stage.index == 2:
            found["before"] = [p.detach().clone() for p in method.trainable_parameters().values()]
            queue = generation_queue(model, stream.tasks, 4)
            found["row"] = evaluate(
                method, stream.tasks, queue, EVALUATION, make_accelerator(TrainingSettings()), profile=Profile()
            )
            running = StageTraining(method, stage, chosen, seed=3, profile=Profile())
            gradients = keep_first_gradients(running)
            running.run(lambda running: None)
            found |= {"gradients": gradients, "losses": running.losses, "validation": running.validation.history}
        method.end_stage(stage.index, stage.task)
    return found


def keep_first_gradients(running: StageTraining) -> list[Tensor]:
    """What the optimizer sees in the first step; filled when it comes."""
    gradients: list[Tensor] = []

    def keep(optimizer: object, arguments: object, keywords: object) -> None:
        if not gradients:
            for parameter in running.parameters.values():
                gradients.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone())

    running.optimizer.optimizer.register_step_pre_hook(keep)
    return gradients


def sums_where_processes_use_different_parameters(accelerator: Any) -> list[float | None]:
    """Parameter i has a gradient in process i alone; the third in none."""
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    rank = accelerator.process_index
    parameters[rank].grad = torch.full((2,), 0.5 if rank == 0 else 50.0)
    sum_gradients(accelerator, parameters)
    return [None if p.grad is None else float(p.grad[0]) for p in parameters]


EVALUATION = load_config(overrides=["evaluation={per_device_eval_batch_size: 4, max_new_tokens: 3}"]).evaluation


class Stopped(KeyboardInterrupt):
    pass


def configuration(folder: Path, output: Path, processes: int) -> Any:
    return load_config(
        overrides=[
            f"stream={folder}", "model=tiny", f"output={output}", "threads=1", "methods=[dmole, seq_ft]",
            f"training={{num_train_epochs: 1, per_device_train_batch_size: {GLOBAL_BATCH // processes}}}",
            "training.save_steps=1",
            "evaluation={per_device_eval_batch_size: 8, max_new_tokens: 3}", "lora={rank: 4, dropout: 0.2}",
            "dmole={proxy_min_samples: 4, router: {epochs: 3}}",
        ]
    )  # fmt: skip


def stopped_and_resumed(config: Any) -> int:
    """The run of `config`, left after every fifth checkpoint and taken up again; how often it was left."""
    count, stops, original = 0, 0, SingleRun._save

    def counted(self: Any, *arguments: Any) -> None:
        nonlocal count
        original(self, *arguments)
        count += 1
        if count % 5 == 0:
            raise Stopped

    SingleRun._save = counted  # type: ignore[method-assign]
    while True:
        try:
            run(config, console=Console(file=io.StringIO()))
            return stops
        except Stopped:
            stops += 1


def main(folder: Path, output: Path) -> None:
    accelerator = make_accelerator(settings(2))
    rank = accelerator.process_index
    results: dict[str, Any] = {"device": str(accelerator.device), "processes": accelerator.num_processes}
    for name in ("seq_ft", "dmole"):
        results[name] = numbers(folder, name)
        results[f"{name}_sharded"] = numbers(folder, name, sharded=True)
    results["unused"] = sums_where_processes_use_different_parameters(accelerator)
    results["dmole_checkpointing"] = numbers(
        folder, "dmole", activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True}
    )
    try:
        set_random_state(accelerator, torch.get_rng_state()[None])
    except ValueError as error:
        results["other_count"] = str(error)
    run(configuration(folder, output / "calm", 2), console=Console(file=io.StringIO()))
    results["stops"] = stopped_and_resumed(configuration(folder, output / "disturbed", 2))
    torch.save(results, output / f"results_{rank}.pt")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
