# SPDX-License-Identifier: Apache-2.0
"""The hooks of a continual-learning method. The runner calls these and knows no method by name.

One run, in the order of the calls (`check` before any training of any method starts):

    method = Cls(vlm, settings, seed=seed)
    method.check(stream)
    for stage in method.stages(stream):
        method.begin_stage(stage.index, stage.task)
        for batch in ...:                           # an optimizer on trainable_parameters()
            with method.training_gates(batch): method.loss(batch).backward()
        method.end_stage(stage.index, stage.task)
        for batch in ...:                           # all test sets, tasks mixed in a batch
            with method.evaluation_gates(batch) as routing: generate(batch)

Resume: a new object, `check`, then `load_state` of the last checkpoint, then on inside the stage. A checkpoint inside a
stage is taken after `begin_stage`, so `load_state` must restore what `begin_stage` made (experts, gates, features).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from dmole.data.collate import Batch
from dmole.files import JSON
from dmole.methods.settings import MethodSettings
from dmole.profile import Profile

if TYPE_CHECKING:
    from dmole.data.sample import Stream, Task
    from dmole.models.vision_language import VisionLanguageModel

Sizes = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The options of a method that has none."""


@dataclass(frozen=True, kw_only=True)
class RoutingRecord:
    """Which tasks' experts served each sample of a batch: best first, () for the base model alone."""

    chosen: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stretch of training: `task.train` is learned, then the tasks in `evaluates` are tested.

    `index` counts stages from 1; `row` is the row of the matrix A[t][i] that the evaluation fills.
    """

    index: int
    row: int
    task: Task
    evaluates: tuple[str, ...]


class Method(ABC):
    """One way to learn a stream of tasks; one file, one class."""

    name: ClassVar[str]
    # A frozen keyword-only dataclass: what a configuration may set under the method's name.
    Options: ClassVar[type[Any]] = NoOptions

    def __init__(self, vlm: VisionLanguageModel, settings: MethodSettings, *, seed: int) -> None:
        self.vlm = vlm
        self.settings = settings
        self.seed = seed
        self.candidates = settings.select_candidates(vlm.candidates)
        # Seconds of the method's own work; the runner keeps them across a resume.
        self.profile = Profile()

    def check(self, stream: Stream) -> None:  # noqa: B027 - an optional hook
        """Raise `ValueError` for settings that this stream and model cannot satisfy. Called before any training."""

    @classmethod
    def trained_weights(cls, settings: MethodSettings, sizes: Sizes) -> int | None:
        """How many weights a stage trains, for `dmole inspect`; None where that is not known before training.

        sizes[tower][linear] is in + out, the weights of an expert of rank 1 there.
        """
        return None

    def stages(self, stream: Stream) -> list[Stage]:
        """The stages of a run: one per task, each tested on all tasks."""
        every = tuple(task.name for task in stream.tasks)
        return [
            Stage(index=index, row=index, task=task, evaluates=every)
            for index, task in enumerate(stream.tasks, start=1)
        ]

    @abstractmethod
    def begin_stage(self, stage: int, task: Task) -> None:
        """Place what stage number `stage` (from 1) trains. Decided by (seed, stage, task) and earlier stages alone."""

    @abstractmethod
    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the current stage trains, by qualified name; valid after `begin_stage`."""

    @abstractmethod
    def training_gates(self, batch: Batch) -> AbstractContextManager[None]:
        """A context in which the model computes with the experts that serve this training batch."""

    @abstractmethod
    def evaluation_gates(self, batch: Batch) -> AbstractContextManager[RoutingRecord | None]:
        """The same at test, where no task is known; yields who serves each sample, or None for unrouted methods.

        Beam search gives each sample several rows, side by side: open gates with the batch's units.
        """

    def validation_gates(self, batch: Batch) -> AbstractContextManager[None]:
        """The same for validation samples of the task that is being trained, before its stage ends."""
        return self.training_gates(batch)

    def loss(self, batch: Batch) -> Tensor:
        """The scalar to minimise: the model's own cross-entropy on the answer tokens, mean over the batch's tokens.

        Opens no gates. The caller does, around this and around backward: activation checkpointing runs the layers
        again during backward, where gates that were open during forward alone are gone.
        """
        return answer_loss(self.vlm, batch)

    def end_stage(self, stage: int, task: Task) -> None:  # noqa: B027 - an optional hook
        """Called once after the last step of a stage."""

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, JSON]]:
        """Tensors and JSON from which `load_state` restores the method in a fresh object, at any step."""

    @abstractmethod
    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, JSON]) -> None:
        """Restore `state()`'s answer; afterwards training and evaluation go on with the same numbers."""

    def report(self) -> dict[str, JSON]:
        """What result.json should keep of this method: allocations, thresholds, counts."""
        return {}

    def timings(self) -> dict[str, float]:
        """Seconds spent in the method's own work (`proxy_seconds`, `router_seconds`), summed over the run."""
        return dict(self.profile.seconds)


def answer_loss(vlm: VisionLanguageModel, batch: Batch) -> Tensor:
    """The model's cross-entropy over the tokens whose label is not -100, mean over the batch's tokens."""
    return vlm.loss(batch.encoded)
