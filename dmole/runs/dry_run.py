# SPDX-License-Identifier: Apache-2.0
"""What a run would do, without doing it: samples and steps of each task, trained weights and answers of each run.

Everything that a run checks before it trains has been checked by then, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dmole.config import RunConfig
from dmole.data.sample import Stream
from dmole.methods import method_class
from dmole.methods.base import Stage
from dmole.methods.budget import linear_sizes
from dmole.models.vision_language import VisionLanguageModel
from dmole.runs.plan import RunPlan
from dmole.training.settings import TrainingSettings
from dmole.training.stage_training import stage_steps

SPLITS = ("train", "validation", "test")


def cuts(stream: Stream, limited: Stream) -> list[str]:
    """A line for each setting that leaves samples of the stream out: no data is left out without a message."""
    lines = []
    for split in SPLITS:
        whole, kept = (sum(len(getattr(task, split)) for task in each.tasks) for each in (stream, limited))
        if kept < whole:
            name = f"{split}_samples"
            lines.append(
                f"{name}: keeps {kept:,} of the {whole:,} {split} samples of {stream.name}; --set {name}=null keeps all"
            )
    return lines


def description(
    plans: Sequence[RunPlan],
    stages: dict[Path, list[Stage]],
    config: RunConfig,
    model: VisionLanguageModel,
    *,
    processes: int,
) -> list[str]:
    """The lines that `dmole run --dry-run` prints."""
    stream = plans[0].stream
    lines = [f"stream {stream.name}: {len(stream.tasks)} tasks"]
    for task in stream.tasks:
        sizes = ", ".join(f"{len(getattr(task, split)):,} {split}" for split in SPLITS)
        steps = _steps(config.training, [Stage(index=1, row=1, task=task, evaluates=())], processes)
        lines.append(f"  {task.name}: {task.metric}, {sizes}, {steps:,} steps")
    for plan in plans:
        own = stages[plan.folder]
        settings = config.method_settings(plan.method)
        linears = linear_sizes(model.model, settings.select_candidates(model.candidates))
        weights = method_class(plan.method).trained_weights(settings, linears) if own else 0
        tests = {task.name: len(task.test) for task in plan.stream.tasks}
        answers = sum(tests[name] for stage in own for name in stage.evaluates)
        trained = "weights known after its start" if weights is None else f"about {weights:,} trained weights a stage"
        lines.append(
            f"{plan.folder.name}: {len(own)} stages, {_steps(config.training, own, processes):,} steps, {trained}, "
            f"{answers:,} answers"
        )
    return lines


def _steps(settings: TrainingSettings, stages: Sequence[Stage], processes: int) -> int:
    return sum(stage_steps(settings, stage, processes=processes) for stage in stages)
