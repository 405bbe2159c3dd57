# SPDX-License-Identifier: Apache-2.0
"""A continual run of D-MoLE with every CPU backend, interleaved in one process.

Each backend has its own copy of the model and its own method object and sees the same batches. They alternate after
every training step and every generated batch (the order rotates), and after every begin and end of a stage. In the
rows, direction is the phase (begin_stage, data, forward, backward, optimizer, end_stage, evaluation_...; `step` is a
whole training step); times are per occurrence.

The losses of the backends at the first step must agree to 2 %, or nothing is timed.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.lora_providers import cpu_backends
from benchmarks.machine import Machine
from benchmarks.records import Row
from benchmarks.timing import percentiles_ms
from dmole.config import RunConfig
from dmole.data.sample import Sample, Stream
from dmole.methods import method_class
from dmole.methods.base import Stage
from dmole.models.vision_language import VisionLanguageModel
from dmole.profile import Profile
from dmole.runs.evaluation import generation_queue, predict
from dmole.runs.plan import fresh_copy
from dmole.training.acceleration import make_accelerator
from dmole.training.stage_training import StageTraining, stage_steps
from dmole_kernels.testing import threads as with_threads

LOSS_TOLERANCE = 0.02
PROFILED_STEPS = 5


class _Pause(Exception):
    """Raised after each step to leave `StageTraining.run`, which continues where it stopped."""


@dataclass
class Side:
    """The run of one backend. `samples[phase]`: seconds of every occurrence."""

    backend: str
    config: RunConfig
    model: VisionLanguageModel
    samples: dict[str, list[float]] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    operators: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.profile = Profile()
        self.method = method_class("dmole")(self.model, self.config.method_settings("dmole"), seed=0)
        self.training: StageTraining | None = None
        # Dropout and the router's training use the default generator of torch: each side restores its own state.
        self._random = torch.get_rng_state()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """This side's backend and random state."""
        torch.set_rng_state(self._random)
        with forced_backend(self.backend):
            yield
        self._random = torch.get_rng_state()

    def timed(self, work: Callable[[], None], whole: str | None = None) -> None:
        """Runs `work` with this side's backend and records the seconds that it added to each phase of the profile."""
        before = dict(self.profile.seconds)
        with self.active():
            work()
        phases = {name: total - before.get(name, 0.0) for name, total in self.profile.seconds.items()}
        phases = {name: seconds for name, seconds in phases.items() if seconds > 0}
        if whole is not None:
            phases[whole] = sum(phases.values())
        for name, seconds in phases.items():
            self.samples.setdefault(name, []).append(seconds)

    @property
    def total_seconds(self) -> float:
        return sum(self.profile.seconds.values())


def forced_backend(name: str) -> contextlib.AbstractContextManager[object]:
    """Uses this backend for all "auto" calls inside; does nothing where it is the only one."""
    if len(cpu_backends()) == 1:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[object] = importlib.import_module("dmole_kernels").use_backend(name)
    return context


def play(
    config: RunConfig, stream: Stream, model: VisionLanguageModel, *, stages: int, steps: int | None,
    batches: int | None, backends: Sequence[str], profiled: int = 0,
) -> list[Side]:  # fmt: skip
    """Runs the first `stages` stages; of each, at most `steps` training steps and `batches` test batches.

    `profiled`: the number of steps at the end of the last stage's training that `operator_profile` runs instead.
    """
    sides = [Side(backend=name, config=config, model=fresh_copy(model)) for name in backends]
    tasks = sorted(stream.tasks, key=lambda task: task.name)
    rotation = 0

    def rotated() -> list[Side]:
        nonlocal rotation
        rotation += 1
        return sides[rotation % len(sides) :] + sides[: rotation % len(sides)]

    chosen = sides[0].method.stages(stream)[:stages]
    for stage in chosen:
        for side in rotated():
            side.timed(_begin(side, stage))
        reserved = profiled if stage is chosen[-1] else 0
        total = stage_steps(config.training, stage) - reserved
        for _ in range(total if steps is None else min(steps, total)):
            for side in rotated():
                side.timed(_step(side), whole="step")
            _check_losses(sides)
        if reserved:
            for side in sides:
                side.operators = operator_profile(side, steps=reserved)
        for side in rotated():
            side.timed(_end(side, stage))
        queue = generation_queue(model, tasks, config.evaluation.per_device_eval_batch_size)[:batches]
        for items in queue:
            for side in rotated():
                side.timed(_predict(side, items))
    return sides


def _begin(side: Side, stage: Stage) -> Callable[[], None]:
    def work() -> None:
        with side.profile.part("begin_stage"):
            side.method.begin_stage(stage.index, stage.task)
        side.training = StageTraining(side.method, stage, side.config.training, seed=0, profile=side.profile)

    return work


def _end(side: Side, stage: Stage) -> Callable[[], None]:
    def work() -> None:
        with side.profile.part("end_stage"):
            side.method.end_stage(stage.index, stage.task)

    return work


def _step(side: Side) -> Callable[[], None]:
    def pause(training: StageTraining) -> None:
        raise _Pause

    def work() -> None:
        assert side.training is not None
        with contextlib.suppress(_Pause):
            side.training.run(pause)
        side.losses.append(side.training.losses[-1])

    return work


def _predict(side: Side, items: Sequence[tuple[str, Sample]]) -> Callable[[], None]:
    def work() -> None:
        accelerator = make_accelerator(side.config.training)
        for _ in predict(side.method, [items], side.config.evaluation, accelerator, profile=side.profile):
            pass

    return work


def _check_losses(sides: Sequence[Side]) -> None:
    if len(sides[0].losses) != 1:
        return
    first = sides[0]
    for side in sides[1:]:
        if abs(side.losses[0] - first.losses[0]) > LOSS_TOLERANCE * abs(first.losses[0]):
            raise ValueError(
                f"the first loss is {side.losses[0]:.6g} with backend {side.backend!r} and {first.losses[0]:.6g} with "
                f"{first.backend!r}; expected agreement to {LOSS_TOLERANCE:.0%}. Nothing is timed: run the op tests."
            )


def rows_of(sides: Sequence[Side], machine: Machine, *, case: str, threads: int) -> list[Row]:
    dtype = "bfloat16" if sides[0].config.training.bf16 else "float32"
    return [
        machine.row(
            case=case, dtype=dtype, direction=phase, threads=threads, provider=side.backend,
            times_ms=percentiles_ms(samples),
        )
        for side in sides
        for phase, samples in sorted(side.samples.items())
    ]  # fmt: skip


def summary(sides: Sequence[Side]) -> list[str]:
    """Total seconds by backend, then by phase, the largest first."""
    lines = []
    for side in sides:
        lines.append(f"{side.backend}: {side.total_seconds:.2f} s")
        phases: Mapping[str, float] = side.profile.seconds
        for phase, seconds in sorted(phases.items(), key=lambda item: -item[1]):
            lines.append(f"  {phase:24s} {seconds:9.2f} s  {100 * seconds / side.total_seconds:5.1f} %")
        for name, seconds in side.method.timings().items():
            lines.append(f"  of which {name:15s} {seconds:9.2f} s")
    fastest = min(sides, key=lambda side: side.total_seconds)
    lines += [
        f"{side.backend} takes {side.total_seconds / fastest.total_seconds:.3f} x the time of {fastest.backend}"
        for side in sides
        if side is not fastest
    ]
    return lines


def operator_profile(side: Side, *, steps: int, count: int = 20) -> list[str]:
    """The operators of the next training steps by self time; these steps are not recorded."""
    recorded_seconds = dict(side.profile.seconds)
    with side.active(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            _step(side)()
    side.profile.seconds = recorded_seconds
    averages = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in averages)
    lines = [f"{side.backend}: operators by self time over {steps} training steps"]
    for event in averages[:count]:
        percent = 100 * event.self_cpu_time_total / total
        milliseconds = event.self_cpu_time_total / 1e3 / steps
        lines.append(
            f"  {event.key[:48]:48s} {milliseconds:9.3f} ms a step {percent:6.1f} %  {event.count // steps} calls"
        )
    return lines


def mini_demo(
    machine: Machine, *, threads: int, stages: int, steps: int | None, batches: int | None, operators: bool
) -> tuple[list[Row], list[str]]:
    """The mini benchmark's demo with every CPU backend, as (rows, lines to read)."""
    from rich.console import Console

    from dmole.recipes import mini_small
    from dmole.sources import open_model, open_stream

    config = mini_small()
    console = Console(stderr=True)
    model = open_model(config)
    stream = open_stream(config.stream, console).limit(
        train=config.train_samples, validation=config.validation_samples, test=config.test_samples
    )
    with with_threads(threads), _deterministic():
        sides = play(
            config, stream, model, stages=stages, steps=steps, batches=batches, backends=cpu_backends(),
            profiled=PROFILED_STEPS if operators else 0,
        )  # fmt: skip
        lines = summary(sides) + [line for side in sides for line in side.operators]
    return rows_of(sides, machine, case="mini_demo", threads=threads), lines


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """As `dmole run` sets it: deterministic algorithms, without filling fresh memory."""
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
