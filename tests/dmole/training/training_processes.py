# SPDX-License-Identifier: Apache-2.0
"""What each process does in test_processes.py; started with torchrun, or imported for the numbers of one process."""

from __future__ import annotations

import gc
import io
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from rich.console import Console
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

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
from dmole.training.acceleration import make_accelerator, set_random_state
from dmole.training.processes import is_sharded, process, shard
from dmole.training.settings import TrainingSettings
from dmole.training.stage_training import StageTraining
from mini_cmit.model.tiny import build_tiny_model

GLOBAL_BATCH = 4


def settings(processes: int, *, batches: int = 1, **changes: Any) -> TrainingSettings:
    return TrainingSettings(
        num_train_epochs=20 / 3,  # 10 samples in windows of 4: 20 steps
        per_device_train_batch_size=GLOBAL_BATCH // (processes * batches),
        gradient_accumulation_steps=batches,
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
    method = method_class(method_name)(
        model, MethodSettings(lora=LoraSettings(rank=4, dropout=0.0), dmole=options), seed=3
    )
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
            found["loss"] = type(running.loss).__name__
            wrapper = weakref.ref(running.loss)
            del running
            gc.collect()
            left = ("forward", "_is_accelerate_prepared")
            found["left"] = [wrapper() is not None, *(name in vars(model.model) for name in left)]
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


def reentrant_under_ddp() -> str:
    """The error of DistributedDataParallel where a parameter is used inside a reentrant checkpoint."""
    outer = torch.nn.Sequential(inner := torch.nn.Linear(2, 2))
    outer.forward = lambda x: checkpoint(inner, x, use_reentrant=True)
    wrapped = DistributedDataParallel(outer, find_unused_parameters=True)
    try:
        wrapped(torch.ones(1, 2, requires_grad=True)).sum().backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


class Branches(torch.nn.Module):
    """Two sharded layers, each with an expert beside it; a process uses the expert of one of them."""

    def __init__(self, used: int) -> None:
        super().__init__()
        self.layers = [torch.nn.Linear(4, 4).requires_grad_(False) for _ in range(2)]
        self.experts = torch.nn.ParameterList(torch.nn.Parameter(torch.ones(4)) for _ in range(2))
        self.used = used

    def forward(self, x: Tensor) -> Tensor:
        for place, layer in enumerate(self.layers):
            x = layer(x) + (x * self.experts[place] if place == self.used else 0)
        return x.sum()


def collectives_of_one_backward(rank: int) -> list[str]:
    """The order in which a backward gathers a sharded base and DistributedDataParallel reduces experts, which are given
    process groups of their own here: in one group, the first of one process would meet the second of the other."""
    branches = Branches(used=rank)
    order: list[str] = []
    mesh = init_device_mesh("cpu", (2,))
    for place, layer in enumerate(branches.layers):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        layer.register_full_backward_pre_hook(lambda *_, place=place: order.append(f"gather layer {place}"))
    wrapped = DistributedDataParallel(
        branches, find_unused_parameters=True, bucket_cap_mb=1e-6, process_group=distributed.new_group()
    )

    def reduced(bucket: Any) -> Any:
        order.append(f"reduce expert {1 - bucket.index()}")  # the last parameter is in the first bucket
        return default_hooks.allreduce_hook(wrapped.process_group, bucket)

    wrapped.register_comm_hook(None, lambda _, bucket: reduced(bucket))  # it refuses annotations that are text
    wrapped(torch.ones(1, 4, requires_grad=True)).backward()
    return order


def weights_after_a_forward_are_sharded() -> bool:
    """Whether the layers of a sharded base give the others' parts back, here where nothing is to come backward."""
    model = build_tiny_model(0)
    shard(model.model, "cpu")
    layer = next(module for module in model.model.modules() if isinstance(module, FSDPModule))
    features = model.text_features(["Which colour?"])
    assert features.isfinite().all() and is_sharded(model.model)
    return all(isinstance(parameter, DTensor) for parameter in layer.parameters())


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
    results["dmole_accumulated"] = numbers(folder, "dmole", batches=2)
    results["dmole_checkpointing"] = numbers(folder, "dmole", activation_checkpointing=True)
    results["dmole_reentrant"] = numbers(
        folder, "dmole", activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True}
    )
    results["order"] = collectives_of_one_backward(rank)
    results["resharded"] = weights_after_a_forward_are_sharded()
    results["reentrant_under_ddp"] = reentrant_under_ddp()
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
