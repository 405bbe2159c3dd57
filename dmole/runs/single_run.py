# SPDX-License-Identifier: Apache-2.0
"""One run from wherever its folder stands to its results: stages, checkpoints, evaluation.

A checkpoint's phase: "begin" (the stage comes next), "train" (inside its steps), "evaluate" (trained, not yet tested).
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dmole.arithmetic import arithmetic
from dmole.config import RunConfig
from dmole.files import write_atomically
from dmole.grown.saved import Base
from dmole.grown.saved import write as write_model
from dmole.methods import method_class
from dmole.methods.base import JSON, Method, Stage
from dmole.models.vision_language import VisionLanguageModel
from dmole.reports.matrix import save_matrix_picture
from dmole.runs import checkpoint
from dmole.runs.checkpoint import CheckpointError
from dmole.runs.environment import describe_environment, peak_memory_gib
from dmole.runs.evaluation import Evaluation, evaluate, evaluated_stages, final_rows, generation_queue
from dmole.runs.interruption import StopSignals
from dmole.runs.plan import RunPlan, fresh_copy
from dmole.runs.progress import RunProgress
from dmole.runs.results import (
    PROFILE_PARTS,
    SUMMARY_COLUMNS,
    aggregate_columns,
    matrix_of,
    prediction_line,
    routing_statistics,
    write_csv,
    write_json,
    write_lines,
    write_matrix,
    write_references,
)
from dmole.runs.rows import read_row, row_bytes, shared_row_file, zero_shot_row
from dmole.seeding import derived_seed
from dmole.training.acceleration import make_accelerator, tracking
from dmole.training.batches import samples_per_step
from dmole.training.processes import shard
from dmole.training.stage_training import Profile, StageTraining
from dmole.training.symptoms import below_zero_shot, flat_loss, malformed_answers

CHECKPOINTS = "checkpoints"
STAGES = "stages"


@dataclass
class Position:
    """Where a run stands; what a checkpoint keeps besides tensors."""

    phase: str = "begin"  # "begin" | "train" | "evaluate": what comes next for `stage`
    stage: int = 0  # place in method.stages(stream)
    rows: dict[str, str] = field(default_factory=dict)  # row -> sha256 of its file in stages/
    stages: list[dict[str, JSON]] = field(default_factory=list)  # finished training: losses, counts, seconds
    profile: dict[str, float] = field(default_factory=dict)
    method_seconds: dict[str, float] = field(default_factory=dict)
    resumes: list[dict[str, JSON]] = field(default_factory=list)


class SingleRun:
    """One plan, from wherever its folder stands to its results. `base` is copied, not changed."""

    def __init__(
        self, plan: RunPlan, config: RunConfig, base: VisionLanguageModel, progress: RunProgress, stop: StopSignals
    ) -> None:
        self.plan = plan
        self.config = config
        self.base = base
        self.accelerator = make_accelerator(config.training, folder=plan.folder)
        self.model = model = fresh_copy(base)
        if config.training.fsdp:
            shard(model.model, self.accelerator.device.type)
        self.progress = progress
        self.stop = stop
        self.profile = Profile()
        self.position = Position()
        self.method: Method = method_class(plan.method)(model, config.method_settings(plan.method), seed=plan.seed)
        self.protocol = self.method.stages(plan.stream)
        self.stages = evaluated_stages(self.protocol, config.evaluation.stages)

    def run(self) -> None:
        folder = self.plan.folder
        if self._writes:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("*.partial"):
                leftover.unlink()  # of a process killed while it wrote; a run's folder has one writer
            self._write_config()
        self.method.check(self.plan.stream)
        with tracking(self.accelerator, self.plan.folder.name, self.config.to_dict()):
            self._run_stages()
        if self._writes:
            self._write_results()
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            shutil.rmtree(folder / STAGES, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    @property
    def _writes(self) -> bool:
        """Of several processes one writes files; what the others need to read is there after a barrier."""
        return bool(self.accelerator.is_main_process)

    def _run_stages(self) -> None:
        training = self._resume()
        self._zero_shot_row()
        while self.position.stage < len(self.stages):
            stage = self.stages[self.position.stage]
            if self.position.phase != "evaluate":
                self._train(stage, training or self._begin(stage))
                training = None
            self._evaluate(stage)

    def _begin(self, stage: Stage) -> StageTraining:
        self.progress.describe(f"{self._label(stage)}: before the first step")
        torch.manual_seed(derived_seed(self.plan.seed, "begin", stage.index))
        with self.profile.part("begin_stage"):
            self.method.begin_stage(stage.index, stage.task)
        training = self._training(stage)
        self._save("train", training)
        self._stop_here(f"before the first step of {self._where(stage)}; a checkpoint is saved")
        return training

    def _label(self, stage: Stage) -> str:
        return f"{self.plan.folder.name}: stage {stage.index}/{len(self.stages)} {stage.task.name}"

    def _where(self, stage: Stage) -> str:
        return f"stage {stage.index} of {len(self.stages)} ({stage.task.name})"

    def _stop_here(self, where: str) -> None:
        """End the run if a signal asked for it; whatever `where` names as saved has been saved."""
        if self.stop.requested is not None:
            raise self.stop.interrupted(f"{self.plan.folder.name} {where}.")

    def _training(self, stage: Stage) -> StageTraining:
        return StageTraining(
            self.method,
            stage,
            self.config.training,
            seed=self.plan.seed,
            profile=self.profile,
            log=self.accelerator.log if self.accelerator.trackers else None,
            first_step=sum(finished["steps"] for finished in self.position.stages),
        )

    @property
    def _units_per_step(self) -> float:
        # Every step counts as a full window, as in the total.
        return self.progress.costs.trained_sample * samples_per_step(
            self.config.training, self.accelerator.num_processes
        )

    def _train(self, stage: Stage, training: StageTraining) -> None:
        self.progress.describe(f"{self._label(stage)}: step {training.step}/{training.total}")

        def after_step(training: StageTraining) -> None:
            step = f"step {training.step}/{training.total}"
            self.progress.describe(f"{self._label(stage)}: {step}, loss {training.losses[-1]:.3f}")
            self.progress.advance(self._units_per_step)
            if training.due("save") or self.stop.requested is not None:
                self._save("train", training)
            place = f"step {training.step} of {training.total} of {self._where(stage)}"
            self._stop_here(f"after {place}; a checkpoint is saved")

        training.run(after_step)
        self.progress.skip(self._units_per_step * (training.total - training.step))
        torch.manual_seed(derived_seed(self.plan.seed, "end", stage.index))
        with self.profile.part("end_stage"):
            self.method.end_stage(stage.index, stage.task)
        self.position.stages.append(
            {
                "stage": stage.index,
                "task": stage.task.name,
                "steps": training.step,
                "planned_steps": training.total,
                "trainable_parameters": training.trainable_count,
                "losses": training.losses,
                "validation": training.validation.history,
            }
        )
        self._save("evaluate")
        self._warn(flat_loss(stage.index, stage.task.name, training.losses, self.config.training))

    def _warn(self, *sentences: str | None) -> None:
        for sentence in sentences:
            if sentence is not None:
                self.progress.note(f"warning: {self.plan.folder.name}: {sentence}")

    def _evaluate(self, stage: Stage) -> None:
        tasks = [task for task in self.plan.stream.tasks if task.name in stage.evaluates]
        losses = self.position.stages[-1]["losses"]
        recent = losses[-max(1, len(losses) // 10) :]
        label = self._label(stage)
        if not tasks:
            self.position.stage += 1
            self._save("begin")
            self.progress.note(
                f"{label}: loss {statistics.fmean(recent):.3f}, not measured "
                f"(evaluation.stages={self.config.evaluation.stages}), {self.progress.time_left()} left"
            )
            return
        # Sorted by name, so that batches are the same whatever the order of learning.
        queue = generation_queue(
            self.model, sorted(tasks, key=lambda task: task.name), self.config.evaluation.per_device_eval_batch_size
        )
        result = evaluate(
            self.method,
            tasks,
            queue,
            self.config.evaluation,
            self.accelerator,
            profile=self.profile,
            after_batch=self._count_answers(
                f"{label}: testing",
                sum(len(task.test) for task in tasks),
                f"in the test after {self._where(stage)}; its training is saved, the test starts again",
            ),
        )
        self.position.rows[str(stage.row)] = self._write_row(stage.row, result)
        self.position.stage += 1
        self._save("begin")
        self._warn(*malformed_answers(stage.row, result, self.plan.stream.task_names[: stage.row]))
        own = f", own task {result.points[stage.task.name]:.1f}" if stage.task.name in result.points else ""
        several = (
            f", mean of {len(tasks)} tasks {statistics.fmean(result.points.values()):.1f}" if len(tasks) > 1 else ""
        )
        self.progress.note(
            f"{label}: loss {statistics.fmean(recent):.3f}{own}{several}, {self.progress.time_left()} left"
        )
        if (cut := sum(result.cut.values())) > 0:
            answers = sum(len(task.test) for task in tasks)
            limit = self.config.evaluation.max_new_tokens
            self.progress.note(f"{label}: {cut} of {answers} answers were cut at evaluation.max_new_tokens={limit}")
        if self.position.stage < len(self.stages):
            self._stop_here(f"after {self._where(stage)}; a checkpoint is saved")

    def _zero_shot_row(self) -> None:
        if "0" in self.position.rows or not self.config.evaluation.zero_shot:
            return
        total = sum(len(task.test) for task in self.plan.stream.tasks)
        name = f"{self.plan.folder.name}: testing the pretrained model"
        count = self._count_answers(name, total, "in the test of the pretrained model; it starts again")
        if shared_row_file(Path(self.config.output), self.plan).exists():
            # Reading it takes no time: it must not count as work done.
            count = lambda answers: self.progress.skip(self.progress.costs.answer * answers)  # noqa: E731
        result = zero_shot_row(self.plan, self.config, self.base, after_batch=count)
        self.position.rows["0"] = self._write_row(0, result)

    def _count_answers(self, what: str, total: int, stopped: str) -> Callable[[int], None]:
        """What `evaluate` calls after each batch: shows the count, and ends the run if a signal asked for it."""
        answered = 0
        self.progress.describe(f"{what}: 0/{total} answers")

        def count(answers: int) -> None:
            nonlocal answered
            answered += answers
            self.progress.describe(f"{what}: {answered}/{total} answers")
            self.progress.advance(self.progress.costs.answer * answers)
            if answered < total:
                self._stop_here(stopped)

        return count

    # -- state ---------------------------------------------------------------------------------------------------------

    def _save(self, phase: str, training: StageTraining | None = None) -> None:
        self.position.phase = phase
        with self.profile.part("checkpoint"):
            tensors, meta = self.method.state()
            files = {"method": tensors}
            documents: dict[str, JSON] = {"method": meta}
            if training is not None:
                files["training"], documents["training"] = training.state()
            self.position.profile = dict(self.profile.seconds)
            self.position.method_seconds = self.method.timings()
            documents["position"] = dataclasses.asdict(self.position)
            documents["identity"] = {
                "fingerprint": self.plan.fingerprint,
                "base_weights": self.plan.identity["base_weights"],
            }
            if self._writes:
                checkpoint.save(self.plan.folder / CHECKPOINTS, files, documents)
            self.accelerator.wait_for_everyone()

    def _resume(self) -> StageTraining | None:
        """Take up the newest checkpoint; the stage's training if it stopped inside one."""
        self.accelerator.wait_for_everyone()
        newest = checkpoint.latest(self.plan.folder / CHECKPOINTS)
        if newest is None:
            return None
        loaded = checkpoint.load(newest)
        identity = loaded.documents["identity"]
        if identity["base_weights"] != self.plan.identity["base_weights"]:
            raise CheckpointError(
                f"{newest} belongs to base weights {identity['base_weights'][:12]}; the model given has "
                f"{self.plan.identity['base_weights'][:12]}. Use the model that the run began with."
            )
        if identity["fingerprint"] != self.plan.fingerprint:
            raise CheckpointError(f"{newest} belongs to a run with other settings. Use the settings in config.json.")
        self.position = Position(**loaded.documents["position"])
        self.profile.seconds = dict(self.position.profile)
        self.method.seconds.update(self.position.method_seconds)
        for row, digest in self.position.rows.items():
            read_row(self._row_path(row), digest)
        self.method.load_state(loaded.tensors["method"], loaded.documents["method"])
        training = None
        if self.position.phase == "train":
            training = self._training(self.stages[self.position.stage])
            training.load_state(loaded.tensors["training"], loaded.documents["training"])
        self._skip_finished_units(training)
        where = {
            "phase": self.position.phase,
            "stage": self.position.stage,
            "step": training.step if training else None,
        }
        self.position.resumes.append({**where, "threads": torch.get_num_threads(), "arithmetic": arithmetic()})
        self.progress.note(f"{self.plan.folder.name}: goes on {self._resume_note(training)}")
        return training

    def _resume_note(self, training: StageTraining | None) -> str:
        """Where the run goes on, such as "after step 40 of 188 of stage 2 of 9 (maps)"."""
        if self.position.stage == len(self.stages):
            return "with its results: every stage is trained and tested"
        stage = self.stages[self.position.stage]
        if training is not None:
            return f"after step {training.step} of {training.total} of {self._where(stage)}"
        if self.position.phase == "evaluate":
            return f"with the test after {self._where(stage)}, whose training is done"
        return f"with {self._where(stage)}"

    def _skip_finished_units(self, training: StageTraining | None) -> None:
        tests = {task.name: len(task.test) for task in self.plan.stream.tasks}
        # A stage that stopped early has no steps left either.
        steps = sum(stage["planned_steps"] for stage in self.position.stages) + (training.step if training else 0)
        tested = sum(tests[name] for stage in self.stages[: self.position.stage] for name in stage.evaluates)
        if "0" in self.position.rows:
            tested += sum(tests.values())
        self.progress.skip(self._units_per_step * steps + self.progress.costs.answer * tested)

    def _row_path(self, row: int | str) -> Path:
        return self.plan.folder / STAGES / f"{row}.json"

    def _write_row(self, row: int, result: Evaluation) -> str:
        data = row_bytes(result)
        if self._writes:
            write_atomically(self._row_path(row), data)
        return hashlib.sha256(data).hexdigest()

    # -- results -------------------------------------------------------------------------------------------------------

    def _write_config(self) -> None:
        plan = self.plan
        document = {
            "method": plan.method,
            "seed": plan.seed,
            "order": plan.order,
            "tasks": list(plan.stream.task_names),
            "fingerprint": plan.fingerprint,
            "identity": plan.identity,
            "config": self.config.to_dict(),
        }
        write_json(plan.folder / "config.json", document)
        write_json(
            plan.folder / "environment.json",
            {
                **describe_environment(),
                "device": self.accelerator.device.type,
                "processes": self.accelerator.num_processes,
                "base_weights_sha256": plan.identity["base_weights"],
            },
        )

    def _write_results(self) -> None:
        plan, folder = self.plan, self.plan.folder
        tasks = list(plan.stream.task_names)
        rows = {int(row): read_row(self._row_path(row), digest) for row, digest in self.position.rows.items()}
        rows = dict(sorted(rows.items()))
        matrix = matrix_of({row: result.points for row, result in rows.items()}, tasks)
        write_matrix(folder / "matrix.csv", matrix, tasks)
        write_lines(
            folder / "predictions.jsonl.gz",
            (prediction_line(row, prediction) for row, result in rows.items() for prediction in result.predictions),
        )
        write_references(folder / "references.jsonl.gz", plan.stream)
        write_csv(
            folder / "losses.csv",
            ("stage", "task", "step", "loss"),
            (
                (stage["stage"], stage["task"], step, loss)
                for stage in self.position.stages
                for step, loss in enumerate(stage["losses"], start=1)
            ),
        )
        saved_model = self._save_model()
        save_matrix_picture(folder / "matrix.png", matrix, tasks, title=folder.name)
        write_json(folder / "result.json", {**self._result(matrix, rows), "model": saved_model})

    def _save_model(self) -> str:
        """Writes `model/`; returns the digest of its document."""
        config, training = self.config, self.config.training
        base = Base(
            # A folder by its whole path: the model may be loaded from another place.
            model=str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model,
            identity=self.model.base_identity(full=True if config.hash_weights else None),
            inputs=self.model.inputs_digest(),
            dtype=config.dtype,
            quantization=config.quantization,
            declaration=dataclasses.asdict(config.declaration),
        )
        return write_model(
            self.plan.folder / "model",
            self.method,
            base=base,
            tasks=[{"name": task.name, "metric": task.metric} for task in self.plan.stream.tasks],
            generation=dataclasses.asdict(config.evaluation),
            precision="bf16" if training.bf16 else "fp16" if training.fp16 else "no",
        )

    def _not_measured(self, matrix: np.ndarray) -> list[list[JSON]]:
        """[row, task] of each cell that the method's protocol measures and `evaluation` leaves out."""
        tasks = list(self.plan.stream.task_names)
        planned = [(0, task) for task in tasks]
        planned += [(stage.row, task) for stage in self.protocol for task in tasks if task in stage.evaluates]
        return [[row, task] for row, task in planned if np.isnan(matrix[row, tasks.index(task)])]

    def _result(self, matrix: np.ndarray, rows: Mapping[int, Evaluation]) -> dict[str, JSON]:
        plan, seconds = self.plan, self.profile.seconds
        tasks = list(plan.stream.task_names)
        routing = {
            str(row): routing_statistics(result.predictions, tasks[:row]) for row, result in rows.items() if row > 0
        }
        routing = {row: values for row, values in routing.items() if values is not None}
        # Shares over a part of the tasks would pass for those over all of them.
        whole = len(tasks) in rows and set(rows[len(tasks)].points) == set(tasks)
        last = (routing.get(str(len(tasks))) or {}) if whole else {}
        final = final_rows(self.protocol, tasks)
        worse = below_zero_shot(
            rows[0].points if 0 in rows else {}, final, {row: result.points for row, result in rows.items()}
        )
        self._warn(*worse)
        flat = [
            flat_loss(stage["stage"], stage["task"], stage["losses"], self.config.training)
            for stage in self.position.stages
        ]
        shapeless = [sentence for row in rows if row > 0 for sentence in malformed_answers(row, rows[row], tasks[:row])]
        steps = sum(stage["steps"] for stage in self.position.stages)
        by_part = {part: 1000 * seconds.get(part, 0.0) / steps for part in PROFILE_PARTS} if steps else {}
        counts = [stage["trainable_parameters"] for stage in self.position.stages]
        timings = self.method.timings()
        train_seconds = sum(seconds.get(part, 0.0) for part in (*PROFILE_PARTS, "begin_stage", "end_stage"))
        evaluation_seconds = sum(value for part, value in seconds.items() if part.startswith("evaluation_"))
        summary = {
            "method": plan.method,
            "seed": plan.seed,
            "order": plan.order,
            **aggregate_columns(matrix, [final[task] for task in tasks]),
            "trainable_parameters": round(statistics.fmean(counts)) if counts else 0,
            "train_seconds": round(train_seconds, 3),
            "proxy_seconds": round(timings.get("proxy_seconds", 0.0), 3),
            "router_seconds": round(timings.get("router_seconds", 0.0), 3),
            "routing_accuracy": last.get("routing_accuracy"),
            "base_model_share": last.get("base_model_share"),
        }
        assert tuple(summary) == SUMMARY_COLUMNS
        total = train_seconds + evaluation_seconds
        shares = {name: value / total for name, value in sorted(timings.items())} if total else {}
        return {
            "summary": summary,
            "trainable_parameters_by_stage": counts,
            "profile": {
                "seconds": {part: round(value, 3) for part, value in sorted(seconds.items())},
                "method_seconds": {name: round(value, 3) for name, value in sorted(timings.items())},
                "method_share_of_run": shares,
                "evaluation_seconds": round(evaluation_seconds, 3),
                "steps": steps,
                "step_ms": sum(by_part.values()) if steps else None,
                "step_ms_by_part": by_part,
            },
            "routing": routing,
            "validation_losses": {stage["task"]: stage["validation"] for stage in self.position.stages},
            "well_formed": {str(row): result.well_formed for row, result in rows.items()},
            "cut_at_max_new_tokens": {str(row): result.cut for row, result in rows.items()},
            "final_rows": final,
            "not_measured": self._not_measured(matrix),
            "warnings": [*(sentence for sentence in flat if sentence is not None), *shapeless, *worse],
            "method": self.method.report(),
            "peak_memory_gib": round(peak_memory_gib(), 3),
            "resumes": self.position.resumes,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
