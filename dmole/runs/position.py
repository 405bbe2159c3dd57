# SPDX-License-Identifier: Apache-2.0
"""Where a run is, and what its checkpoints contain.

    position     phase, stage, finished rows and stages, seconds so far
    identity     the fingerprint of the settings and the digest of the base weights
    method       `Method.state()`
    training     `StageTraining.state()`, in phase "train" only

Phases: "begin" (the stage comes next), "train" (inside its steps), "evaluate" (trained, not yet tested).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dmole.data.sample import Stream
from dmole.files import JSON
from dmole.methods.base import Method, Stage
from dmole.runs import checkpoint
from dmole.runs.checkpoint import Checkpoint, CheckpointError
from dmole.runs.plan import RunPlan
from dmole.training.stage_training import StageTraining

CHECKPOINTS = "checkpoints"


@dataclass
class Position:
    """How far a run has come; what a checkpoint keeps besides the states of method and training."""

    phase: str = "begin"
    stage: int = 0  # place in method.stages(stream)
    rows: dict[str, str] = field(default_factory=dict)  # row -> sha256 of its file in stages/
    stages: list[dict[str, JSON]] = field(default_factory=list)  # finished training: losses, counts, steps
    profile: dict[str, float] = field(default_factory=dict)
    method_seconds: dict[str, float] = field(default_factory=dict)
    resumes: list[dict[str, JSON]] = field(default_factory=list)

    def finished(self, stages: Sequence[Stage], stream: Stream, training: StageTraining | None) -> tuple[int, int]:
        """(optimizer steps, answers) that are done; a stage that stopped early has no steps left either."""
        tests = {task.name: len(task.test) for task in stream.tasks}
        steps = sum(stage["planned_steps"] for stage in self.stages) + (training.step if training else 0)
        answers = sum(tests[name] for stage in stages[: self.stage] for name in stage.evaluates)
        return steps, answers + ("0" in self.rows) * sum(tests.values())

    def describe(self, stages: Sequence[Stage], training: StageTraining | None) -> str:
        """Where a resumed run goes on, such as "after step 40 of 188 of stage 2 of 9 (maps)"."""
        if self.stage == len(stages):
            return "with its results: every stage is trained and tested"
        where = stage_of(stages[self.stage], stages)
        if training is not None:
            return f"after step {training.step} of {training.total} of {where}"
        return f"with the test after {where}, whose training is done" if self.phase == "evaluate" else f"with {where}"


def stage_of(stage: Stage, stages: Sequence[Stage]) -> str:
    """Such as "stage 2 of 9 (maps)"."""
    return f"stage {stage.index} of {len(stages)} ({stage.task.name})"


def save_position(
    plan: RunPlan, position: Position, method: Method, training: StageTraining | None, write: bool
) -> None:
    """Write a checkpoint of the run `plan`. Every process calls this, because states are gathered; one writes."""
    tensors, meta = method.state()
    files, documents = {"method": tensors}, {"method": meta}
    if training is not None:
        files["training"], documents["training"] = training.state()
    documents["position"] = dataclasses.asdict(position)
    documents["identity"] = {"fingerprint": plan.fingerprint, "base_weights": plan.identity["base_weights"]}
    if write:
        checkpoint.save(plan.folder / CHECKPOINTS, files, documents)


def read_position(plan: RunPlan) -> tuple[Position, Checkpoint] | None:
    """The newest checkpoint of the run `plan`; None without one. CheckpointError where it belongs to another run."""
    newest: Path | None = checkpoint.latest(plan.folder / CHECKPOINTS)
    if newest is None:
        return None
    loaded = checkpoint.load(newest)
    identity = loaded.documents["identity"]
    if identity["base_weights"] != plan.identity["base_weights"]:
        raise CheckpointError(
            f"{newest} belongs to base weights {identity['base_weights'][:12]}; the model given has "
            f"{plan.identity['base_weights'][:12]}. Use the model that the run began with."
        )
    if identity["fingerprint"] != plan.fingerprint:
        raise CheckpointError(f"{newest} belongs to a run with other settings. Use the settings in config.json.")
    return Position(**loaded.documents["position"]), loaded
