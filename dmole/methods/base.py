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

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from dmole.data.collate import Batch
from dmole.files import JSON
from dmole.methods.budget import Sizes
from dmole.methods.settings import MethodSettings
from dmole.models.adapters import Adapters, attach
from dmole.profile import Profile
from dmole_kernels import ExpertGates

if TYPE_CHECKING:
    from dmole.data.sample import Stream, Task
    from dmole.models.vision_language import VisionLanguageModel

Layers = Mapping[str, Mapping[str, nn.Linear]]


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The options of a method that has none."""


@dataclass(frozen=True, kw_only=True)
class RoutingRecord:
    """Which tasks' experts are active for each sample of a batch: best first, () for the base model alone.

    Attributes:
        errors_NT: what the choice was made by, [samples, tasks], lower fits better; columns as in `thresholds`.
        thresholds: by task, the largest error that still fits.
    """

    chosen: tuple[tuple[str, ...], ...]
    errors_NT: Tensor | None = dataclasses.field(default=None, compare=False)
    thresholds: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stretch of training: `task.train` is learned, then the tasks in `evaluates` are tested.

    `index` counts stages from 1; `row` is the row of the matrix A[t][i] that the evaluation fills.
    """

    index: int
    row: int
    task: Task
    evaluates: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class OwnWork:
    """What a method computes besides training steps and answers, in a whole run; for the estimate before the start.

    Attributes:
        forward: Samples that pass forward through the pretrained model.
        backward: How many of them also pass backward, with gradients of the candidates' weights.
        memory_bytes: What it keeps meanwhile, besides the model and its activations.
    """

    forward: int = 0
    backward: int = 0
    memory_bytes: float = 0.0


class Method(ABC):
    """One way to learn a stream of tasks; one file, one class."""

    name: ClassVar[str]
    # A frozen keyword-only dataclass: what a configuration may set under the method's name.
    Options: ClassVar[type[Any]] = NoOptions
    # Whether the tables divide the other methods' step times by this one's.
    time_baseline: ClassVar[bool] = False
    # How a trained model knows which experts a sample uses: "all" samples use the same, a "router" looks at the sample,
    # or the "caller" has to name a task.
    routed_by: ClassVar[Literal["all", "router", "caller"]] = "all"

    def __init__(self, vlm: VisionLanguageModel, settings: MethodSettings, *, seed: int) -> None:
        self.vlm = vlm
        self.settings = settings
        self.seed = seed
        self.candidates = settings.select_candidates(vlm.candidates)
        # Seconds of the method's own work; the runner keeps them across a resume.
        self.profile = Profile()
        # True where the model answers requests of users: batches do not repeat, so nothing is kept for the next one.
        self.serving = False
        # Whether LoRA experts are all that is learned of the model's weights: False where base weights change too.
        self.plain_lora = True

    def attached(self, gates: Mapping[str, ExpertGates]) -> Adapters:
        """The candidates of the model, wrapped to carry experts with the dropout of the settings."""
        lora = self.settings.lora
        return attach(
            self.vlm.model,
            self.candidates,
            gates=gates,
            dropout=lora.dropout,
            dropout_mode=lora.dropout_mode,
            rows=self.vlm.rows,
        )

    def check(self, stream: Stream) -> None:  # noqa: B027 - an optional hook
        """Raise `ValueError` for settings that this stream and model cannot satisfy. Called before any training."""

    @classmethod
    def trained_weights(cls, settings: MethodSettings, sizes: Sizes) -> int | None:
        """How many weights a stage trains, for `dmole inspect` and the estimate; None where only data decide.

        sizes[tower][linear] is in + out, the weights of an expert of rank 1 there. What all methods are to train is
        `settings.budget.weights(settings.lora.rank, sizes)`; `dmole.methods.budget.parity_rank` is the rank with which
        an adapter on all candidates does.
        """
        return None

    @classmethod
    def own_work(cls, settings: MethodSettings, stages: Sequence[Stage], stream: Stream, layers: Layers) -> OwnWork:
        """What a run over `stages` computes besides steps and answers; layers[tower][linear] are the candidates."""
        return OwnWork()

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

    def routes(self, batch: Batch) -> RoutingRecord | None:
        """Which tasks' experts the samples use at test, where no task is known; None if all use the same experts."""
        return None

    def forget(self, task: str, *, keep_weights: bool = False) -> None:
        """Take a task's expert out of the routing, and its weights out of the model unless `keep_weights`.

        Raises ValueError for a task without an expert of its own.
        """
        raise ValueError(
            f"task: got {task!r} for a model of {self.name}, where no task has weights of its own; expected a method "
            f"with one expert per task. Train again without the task."
        )

    def as_of(self, tasks: Sequence[str]) -> AbstractContextManager[None]:
        """A context in which the model answers as it did when it had learned `tasks`, its first ones, and no more.

        Raises ValueError for a method that keeps nothing of what it was.
        """
        raise ValueError(
            f"backfill: got a model of {self.name}, which keeps nothing of what it was before its last stage; expected "
            f"a method whose experts stay as they are. Leave it out: the earlier rows stay empty for the new task."
        )

    def adopt(self, task: Task, lora: Path) -> None:
        """Make the stock PEFT LoRA folder `lora` the expert of `task`, with what a sample's route is chosen by.

        Raises ValueError for a method without a router, and for a folder that is no plain LoRA on candidates.
        """
        raise ValueError(
            f"import: got a model of {self.name}, which has no router that could send samples to the expert; expected "
            f"one with experts and a router, such as dmole's. Import it there."
        )

    def trained_beside(self) -> dict[str, dict[str, int]]:
        """By task, the older tasks whose frozen experts were active when its expert was trained, with how many of its
        training samples had each; {} where experts are trained alone."""
        return {}

    def task_gates(self, batch: Batch, tasks: Sequence[Sequence[str]]) -> AbstractContextManager[None]:
        """A context in which sample s uses the experts of the tasks `tasks[s]`; () is the base model alone.

        Raises ValueError for a task without an expert, and for a method whose samples all use the same experts.
        """
        raise ValueError(
            f"tasks: got {[list(names) for names in tasks[:3]]} for a model of {self.name}, whose samples all use the "
            f"same experts; expected none. Leave it out."
        )

    def task_experts(self) -> dict[str, str]:
        """The expert of each task, by the name that its weights have; {} where tasks have no experts of their own."""
        return {}

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
        """Seconds spent in the method's own work by name ("proxy_seconds"), summed over the run.

        They are columns of summary.csv, and the table of times shows each as a share of the run.
        """
        return dict(self.profile.seconds)

    def columns(self) -> dict[str, float | int | str | None]:
        """Further columns of summary.csv. Called once, after the last evaluation."""
        return {}


class Pretrained(Method):
    """The pretrained model as it is, with nothing trained and nothing added: row 0 of every matrix."""

    @classmethod
    def trained_weights(cls, settings: MethodSettings, sizes: Sizes) -> int:
        return 0

    def stages(self, stream: Stream) -> list[Stage]:
        return []

    def begin_stage(self, stage: int, task: Task) -> None:
        raise ValueError(f"stage: got {stage} ({task.name}); expected none, the pretrained model has no stages.")

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return {}

    def training_gates(self, batch: Batch) -> AbstractContextManager[None]:
        return nullcontext()

    def evaluation_gates(self, batch: Batch) -> AbstractContextManager[RoutingRecord | None]:
        return nullcontext()

    def state(self) -> tuple[dict[str, Tensor], dict[str, JSON]]:
        return {}, {}

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, JSON]) -> None:
        if tensors or meta:
            raise ValueError(f"state: got {sorted(tensors) + sorted(meta)}; expected none of the pretrained model.")


def answer_loss(vlm: VisionLanguageModel, batch: Batch) -> Tensor:
    """The model's cross-entropy over the tokens whose label is not -100, mean over the batch's tokens."""
    return vlm.loss(batch.encoded)
