# SPDX-License-Identifier: Apache-2.0
"""What a run will cost, before it starts: hours, memory and disk.

    seconds = steps * seconds of a step * 1.3 + answers * seconds of an answer

One training batch and one generation batch of the user's own samples are timed on the pretrained model, after a first
small one that loads kernels and fills caches. The factor stands for the experts, which are not placed yet. The proxy
and the router of D-MoLE are not in it.

    memory = peak of the two batches + the run's copy of the weights + 16 bytes per trained weight
    disk   = 2 checkpoints of (experts of all stages * 4 + 8 bytes per trained weight) + 200 bytes per answer

A trained weight is 4 bytes of value, 4 of gradient and 8 of AdamW's moments, in float32. The old checkpoint goes when
the new one is complete.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from dmole.config import RunConfig
from dmole.data.collate import collate
from dmole.data.sample import Sample, Stream
from dmole.machine import memory_gib, peak_memory_gib
from dmole.methods.base import Stage, answer_loss
from dmole.models.vision_language import VisionLanguageModel
from dmole.runs.generation import generate
from dmole.runs.plan import RunPlan
from dmole.runs.progress import Costs, clock
from dmole.training.acceleration import make_accelerator
from dmole.training.batches import samples_per_step
from dmole.training.stage_training import stage_steps

# Step times of Seq-FT and D-MoLE on the mini model over a step without adapters.
EXPERTS = 1.3
BYTES_PER_ANSWER = 200
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the two timed batches took: seconds per sample trained and per answer, and the peak of memory in bytes."""

    trained_sample: float
    answer: float
    peak_bytes: float
    device: str

    @property
    def costs(self) -> Costs:
        """The same as units of work for `RunProgress`, in seconds."""
        return Costs(trained_sample=self.trained_sample * EXPERTS, answer=self.answer, measured=True)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The costs of all runs that are still to be made. Memory and disk are those of the largest run and of all."""

    seconds: float
    steps: int
    answers: int
    memory_bytes: float
    disk_bytes: float
    device: str

    def __str__(self) -> str:
        return (
            f"estimate: {clock(self.seconds)} on {self.device} for {self.steps:,} training steps and "
            f"{self.answers:,} answers, {self.memory_bytes / GIB:.1f} GiB of memory, "
            f"{self.disk_bytes / GIB:.2f} GiB on disk"
        )

    def shortages(self, output: Path) -> list[str]:
        """A sentence for each of memory and disk of which there is less than the estimate."""
        found = []
        room = memory_gib() if self.device == "cpu" else torch.cuda.get_device_properties(0).total_memory / GIB
        if room is not None and self.memory_bytes > room * GIB:
            found.append(
                f"memory: {self.device} has {room:.1f} GiB; the runs need about {self.memory_bytes / GIB:.1f} GiB. "
                "Lower training.per_device_train_batch_size and evaluation.per_device_eval_batch_size."
            )
        existing = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        if self.disk_bytes > free:
            found.append(
                f"disk: {existing} has {free / GIB:.2f} GiB free; the runs need about {self.disk_bytes / GIB:.2f} GiB. "
                "Choose another --output or make room."
            )
        return found


def measure(model: VisionLanguageModel, stream: Stream, config: RunConfig) -> Rates:
    """Time a training batch and a generation batch of `stream` on the pretrained model. Changes no weight."""
    device = model.model.device.type
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    train = _first([task.train for task in stream.tasks], config.training.per_device_train_batch_size)
    test = _first([task.test for task in stream.tasks], config.evaluation.per_device_eval_batch_size)
    step = _timed(lambda samples: _train(model, samples, config), train, device)
    answer = _timed(lambda samples: _answer(model, samples, config), test, device)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory_gib() * GIB
    return Rates(trained_sample=step / len(train), answer=answer / len(test), peak_bytes=peak, device=device)


def _first(splits: Sequence[Sequence[Sample]], count: int) -> list[Sample]:
    """The first samples of all tasks in turns, so that the batch is as mixed as the work is."""
    longest = max(len(split) for split in splits)
    turns = (split[place] for place in range(longest) for split in splits if place < len(split))
    return list(islice(turns, count))


def _timed(work: Callable[[Sequence[Sample]], None], samples: Sequence[Sample], device: str) -> float:
    # One sample loads kernels; a whole batch, once, reads images that a cache will hold. Neither is timed.
    work(samples[:1])
    if len(samples) > 1:
        work(samples)
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work(samples)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _train(model: VisionLanguageModel, samples: Sequence[Sample], config: RunConfig) -> None:
    # transformers does not type the two hooks.
    net = cast(Any, model.model)
    # As with experts, gradients pass through every layer and reach no pretrained weight.
    net.enable_input_require_grads()
    try:
        with make_accelerator(config.training).autocast():
            loss = answer_loss(model, collate(model, samples, with_answers=True))
        torch.autograd.backward(loss)
    finally:
        net.disable_input_require_grads()


def _answer(model: VisionLanguageModel, samples: Sequence[Sample], config: RunConfig) -> None:
    batch = collate(model, samples, with_answers=False)
    with make_accelerator(config.training).autocast():
        generate(model, batch, config.evaluation, [str(number) for number in range(len(samples))])


def trained_weights(model: nn.Module, config: RunConfig, candidates: dict[str, tuple[str, ...]]) -> int:
    """About how many weights a stage trains, the same for every method: rank x (in + out) over D-MoLE's budget."""
    layers = [cast(nn.Linear, model.get_submodule(name)) for names in candidates.values() for name in names]
    every = config.lora.rank * sum(layer.in_features + layer.out_features for layer in layers)
    return math.ceil(every * config.method_settings("dmole").dmole.budget_fraction)


def estimate(
    plans: Sequence[RunPlan],
    stages: dict[Path, list[Stage]],
    config: RunConfig,
    model: VisionLanguageModel,
    rates: Rates,
) -> Estimate:
    """The costs of `plans` at these rates."""
    settings = config.method_settings(plans[0].method)
    trained = trained_weights(model.model, config, settings.select_candidates(model.candidates))
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.model.state_dict().values())
    steps = answers = 0
    checkpoint = 0.0
    for place, plan in enumerate(plans):
        tests = {task.name: len(task.test) for task in plan.stream.tasks}
        own = stages[plan.folder]
        steps += sum(stage_steps(config.training, stage) for stage in own)
        answers += sum(tests[name] for stage in own for name in stage.evaluates)
        # Row 0 is measured once and read by the other runs.
        answers += sum(tests.values()) * (config.evaluation.zero_shot and place == 0)
        checkpoint = max(checkpoint, trained * (4.0 * len(own) + 8.0 * bool(own)))
    costs = rates.costs
    return Estimate(
        seconds=steps * samples_per_step(config.training, 1) * costs.trained_sample + answers * costs.answer,
        steps=steps,
        answers=answers,
        memory_bytes=rates.peak_bytes + weights + 16.0 * trained * (steps > 0),
        disk_bytes=2 * checkpoint + BYTES_PER_ANSWER * answers,
        device=rates.device,
    )
