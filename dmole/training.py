# SPDX-License-Identifier: Apache-2.0
"""The optimizer steps of one stage, which can stop between any two of them and go on with the same numbers.

    for step in 0 .. total - 1:  w <- AdamW(w, grad of method.loss(batch(step)), lr(step))
    lr(step) = peak * (step + 1) / W                               for step < W = ceil(warmup * total)
             = peak * (1 + cos(pi (step - W) / (total - W))) / 2   after that

batch(step) follows from (seed, stage, epoch) alone. What a resume needs besides the method's own state is the step,
AdamW's moments and torch's random state (dropout): `StageTraining.state`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dmole.config import TrainingSettings
from dmole.data.collate import collate
from dmole.methods.base import JSON, Method, Stage
from dmole.seeding import derived_generator, derived_seed

if TYPE_CHECKING:
    from dmole.data.sample import Sample


@dataclass
class Profile:
    """Seconds by part of the work: data, forward, backward, optimizer, generation, scoring, checkpoint."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """lr(step) / peak of the module docstring, for step = 0 .. total - 1."""
    rising = math.ceil(warmup * total)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def batch_indices(count: int, batch_size: int, *, seed: int, stage: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch: a permutation of 0 .. count - 1 that depends on (seed, stage, epoch) alone."""
    order = torch.randperm(count, generator=derived_generator(seed, "order", stage, epoch)).tolist()
    return [order[start : start + batch_size] for start in range(0, count, batch_size)]


def stage_epochs(settings: TrainingSettings, stage: Stage) -> int:
    """How many epochs the stage's task trains."""
    return settings.epochs_of.get(stage.task.name, settings.epochs)


def stage_steps(settings: TrainingSettings, stage: Stage) -> int:
    """How many optimizer steps the stage takes."""
    return stage_epochs(settings, stage) * math.ceil(len(stage.task.train) / settings.batch_size)


class StageTraining:
    """One stage between `method.begin_stage` and `method.end_stage`."""

    def __init__(
        self, method: Method, stage: Stage, settings: TrainingSettings, *, seed: int, profile: Profile
    ) -> None:
        self.method = method
        self.stage = stage
        self.settings = settings
        self.seed = seed
        self.profile = profile
        self.step = 0
        self.total = stage_steps(settings, stage)
        self.losses: list[float] = []
        self.parameters = method.trainable_parameters()
        if not self.parameters:
            raise ValueError(f"{method.name} trains no parameter in stage {stage.index} ({stage.task.name}).")
        for name, parameter in self.parameters.items():
            # bf16 weights swallow the small late updates of AdamW.
            if parameter.dtype != torch.float32 or not parameter.requires_grad:
                raise ValueError(
                    f"{name} is {parameter.dtype}, requires_grad={parameter.requires_grad}; "
                    "expected a float32 parameter that requires a gradient."
                )
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        # From here on dropout draws from torch's global state; `load_state` overwrites it on resume.
        torch.manual_seed(derived_seed(seed, "dropout", stage.index))

    @property
    def trainable_count(self) -> int:
        """How many weights this stage trains."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def run(self, after_step: Callable[[StageTraining], None]) -> None:
        """Train from `self.step` to the end, calling `after_step(self)` after each optimizer step."""
        model = self.method.mm.model
        samples = self.stage.task.train
        model.train()
        try:
            while self.step < self.total:
                self._one_step(samples)
                after_step(self)
        finally:
            model.train(False)

    def _one_step(self, samples: Sequence[Sample]) -> None:
        settings, profile = self.settings, self.profile
        with profile.part("data"):
            batch = collate(self.method.mm, [samples[index] for index in self._indices()], with_answers=True)
        with profile.part("forward"):
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
                loss = self.method.loss(batch)
            value = float(loss.detach())
        if not math.isfinite(value):
            raise ValueError(
                f"the loss is {value} at step {self.step + 1} of {self.total} of stage {self.stage.index} "
                f"({self.stage.task.name}); expected a finite number. "
                f"Lower training.learning_rate (now {settings.learning_rate:g})."
            )
        with profile.part("backward"):
            torch.autograd.backward(loss)
        with profile.part("optimizer"):
            if settings.max_grad_norm > 0:
                torch.nn.utils.clip_grad_norm_(self.parameters.values(), settings.max_grad_norm)
            factor = learning_rate_factor(self.step, self.total, settings.warmup)
            for group in self.optimizer.param_groups:
                group["lr"] = settings.learning_rate * factor
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(value)
        self.step += 1

    def _indices(self) -> list[int]:
        count = len(self.stage.task.train)
        per_epoch = math.ceil(count / self.settings.batch_size)
        epoch, place = divmod(self.step, per_epoch)
        if place == 0 or not hasattr(self, "_epoch"):
            self._epoch = batch_indices(
                count, self.settings.batch_size, seed=self.seed, stage=self.stage.index, epoch=epoch
            )
        return self._epoch[place]

    def state(self) -> tuple[dict[str, Tensor], dict[str, JSON]]:
        """AdamW's moments by parameter name, torch's random state, the step and the losses so far."""
        tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                tensors[f"{names[id(parameter)]}/{key}"] = value
        return tensors, {"step": self.step, "losses": self.losses}

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, JSON]) -> None:
        """Restore `state()`'s answer; the method's own state must have been restored before this object was made."""
        keys = ("step", "exp_avg", "exp_avg_sq")
        got = set(tensors) - {"rng"}
        # A parameter that no gradient has reached has no moments: the last vision layer of a model that reads the one
        # before it. All of one, or none of them.
        moved = [name for name in self.parameters if any(f"{name}/{key}" in got for key in keys)]
        expected = {f"{name}/{key}" for name in moved for key in keys}
        if got != expected:
            raise ValueError(
                f"the optimizer state has {sorted(got - expected)[:3]} and lacks {sorted(expected - got)[:3]}; "
                f"expected the moments of the {len(self.parameters)} parameters that stage {self.stage.index} trains."
            )
        for name in moved:
            self.optimizer.state[self.parameters[name]] = {key: tensors[f"{name}/{key}"].clone() for key in keys}
        self.step = int(meta["step"])
        self.losses = [float(loss) for loss in meta["losses"]]
        torch.set_rng_state(tensors["rng"])
