# SPDX-License-Identifier: Apache-2.0
"""What a run will cost, before it starts: hours, memory and disk.

    seconds = steps * seconds of a step * 1.3 + answers * seconds of an answer + seconds of the method's own passes

One training batch and one generation batch of the user's own samples are timed on the pretrained model, after a first
small one that loads kernels and fills caches. The factor stands for the experts, which are not placed yet. A method's
own passes are those outside steps and answers, such as D-MoLE's proxy and router features (`Method.own_work`).

    memory = peak of the two batches + the run's copy of the weights
             + the larger of 16 bytes per trained weight and what the method's own passes keep
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
from dmole.methods import method_class
from dmole.methods.base import Layers, Stage, answer_loss
from dmole.methods.budget import linear_sizes
from dmole.models.vision_language import VisionLanguageModel
from dmole.runs.generation import generate
from dmole.runs.plan import RunPlan
from dmole.runs.progress import Costs, clock
from dmole.training.acceleration import make_accelerator
from dmole.training.batches import samples_per_step
from dmole.training.stage_training import stage_steps

# Measured step times with experts, on a model of 7 M parameters, over a step without them.
EXPERTS = 1.3
# A forward pass over a training step of a frozen model, whose backward computes no gradient of a weight and so costs
# about as much. With those gradients, as in D-MoLE's proxy, it costs twice that.
FORWARD = 0.5
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


def _candidates(plan: RunPlan, config: RunConfig, model: VisionLanguageModel) -> Layers:
    chosen = config.method_settings(plan.method).select_candidates(model.candidates)
    return {
        tower: {name: cast(nn.Linear, model.model.get_submodule(name)) for name in names}
        for tower, names in chosen.items()
    }


def trained_weights(method: str, config: RunConfig, model: VisionLanguageModel) -> int:
    """About how many weights a stage trains: what the method says, or the budget where only data decide."""
    settings = config.method_settings(method)
    sizes = linear_sizes(model.model, settings.select_candidates(model.candidates))
    known = method_class(method).trained_weights(settings, sizes)
    return math.ceil(config.budget.weights(config.lora.rank, sizes)) if known is None else known


def estimate(
    plans: Sequence[RunPlan],
    stages: dict[Path, list[Stage]],
    config: RunConfig,
    model: VisionLanguageModel,
    rates: Rates,
) -> Estimate:
    """The costs of `plans` at these rates."""
    trained = {method: trained_weights(method, config, model) for method in {plan.method for plan in plans}}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.model.state_dict().values())
    steps = answers = 0
    checkpoint = memory = own_samples = 0.0
    for place, plan in enumerate(plans):
        tests = {task.name: len(task.test) for task in plan.stream.tasks}
        own = stages[plan.folder]
        steps += sum(stage_steps(config.training, stage) for stage in own)
        answers += sum(tests[name] for stage in own for name in stage.evaluates)
        # Row 0 is measured once and read by the other runs.
        answers += sum(tests.values()) * (config.evaluation.zero_shot and place == 0)
        checkpoint = max(checkpoint, trained[plan.method] * (4.0 * len(own) + 8.0 * bool(own)))
        work = method_class(plan.method).own_work(
            config.method_settings(plan.method), own, plan.stream, _candidates(plan, config, model)
        )
        own_samples += FORWARD * work.forward + (1.0 - FORWARD) * 2.0 * work.backward
        # What a method computes for itself comes before and after training.
        memory = max(memory, 16.0 * trained[plan.method] * bool(own), work.memory_bytes)
    costs = rates.costs
    return Estimate(
        seconds=steps * samples_per_step(config.training, 1) * costs.trained_sample
        + answers * costs.answer
        + own_samples * rates.trained_sample,
        steps=steps,
        answers=answers,
        memory_bytes=rates.peak_bytes + weights + memory,
        disk_bytes=2 * checkpoint + BYTES_PER_ANSWER * answers,
        device=rates.device,
    )
