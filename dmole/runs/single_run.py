# SPDX-License-Identifier: Apache-2.0
"""One run from wherever its folder stands to its results: stages, checkpoints, evaluation."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from dmole.arithmetic import arithmetic
from dmole.config import RunConfig
from dmole.methods import method_class
from dmole.methods.base import Method, Stage
from dmole.models.vision_language import VisionLanguageModel
from dmole.profile import Profile
from dmole.reports.matrix import save_matrix_picture
from dmole.reports.stored import read_matrix
from dmole.runs.evaluation import Evaluation, evaluate, evaluated_stages, generation_queue
from dmole.runs.interruption import StopSignals
from dmole.runs.plan import RunPlan, fresh_copy
from dmole.runs.position import CHECKPOINTS, Position, read_position, save_position, stage_of
from dmole.runs.progress import RunProgress
from dmole.runs.results import write_run_results, write_run_settings
from dmole.runs.rows import read_row, shared_row_file, write_row, zero_shot_row
from dmole.seeding import derived_seed
from dmole.training.acceleration import make_accelerator, tracking
from dmole.training.batches import samples_per_step
from dmole.training.damage import check_unchanged, weight_sums
from dmole.training.processes import shard
from dmole.training.stage_training import StageTraining
from dmole.training.symptoms import flat_loss, malformed_answers

STAGES = "stages"


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
        self._base_sums = weight_sums(base.model)  # all copies share these tensors
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
            _remove_leftovers(folder)
            write_run_settings(self.plan, self.config, self.accelerator)
        self.method.check(self.plan.stream)
        with tracking(self.accelerator, self.plan.folder.name, self.config.to_dict()):
            self._run_stages()
        if self._writes:
            rows = {int(row): read_row(self._row_path(row), digest) for row, digest in self.position.rows.items()}
            self._warn(
                *write_run_results(
                    self.plan,
                    self.config,
                    self.method,
                    self.protocol,
                    self.position,
                    dict(sorted(rows.items())),
                )
            )
            clean_up(folder)
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
        return stage_of(stage, self.stages)

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
        training.check_logits()
        self._check_base()
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

    def _check_base(self) -> None:
        stage = self.stages[min(self.position.stage, len(self.stages) - 1)]
        check_unchanged(self.base.model, self._base_sums, f"in {self._where(stage)}")

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

    def _save(self, phase: str, training: StageTraining | None = None) -> None:
        if training is not None:
            training.check_numbers()
        self._check_base()
        self.position.phase = phase
        with self.profile.part("checkpoint"):
            self.position.profile = dict(self.profile.seconds)
            self.position.method_seconds = self.method.timings()
            save_position(self.plan, self.position, self.method, training, self._writes)
            self.accelerator.wait_for_everyone()

    def _resume(self) -> StageTraining | None:
        """Take up the newest checkpoint; the stage's training if it stopped inside one."""
        self.accelerator.wait_for_everyone()
        found = read_position(self.plan)
        if found is None:
            return None
        self.position, loaded = found
        self.profile.seconds = dict(self.position.profile)
        self.method.profile.seconds.update(self.position.method_seconds)
        for row, digest in self.position.rows.items():
            read_row(self._row_path(row), digest)
        self.method.load_state(loaded.tensors["method"], loaded.documents["method"])
        training = None
        if self.position.phase == "train":
            training = self._training(self.stages[self.position.stage])
            training.load_state(loaded.tensors["training"], loaded.documents["training"])
        steps, answers = self.position.finished(self.stages, self.plan.stream, training)
        self.progress.skip(self._units_per_step * steps + self.progress.costs.answer * answers)
        where = {
            "phase": self.position.phase,
            "stage": self.position.stage,
            "step": training.step if training else None,
        }
        self.position.resumes.append({**where, "threads": torch.get_num_threads(), "arithmetic": arithmetic()})
        self.progress.note(f"{self.plan.folder.name}: goes on {self.position.describe(self.stages, training)}")
        return training

    def _row_path(self, row: int | str) -> Path:
        return self.plan.folder / STAGES / f"{row}.json"

    def _write_row(self, row: int, result: Evaluation) -> str:
        return write_row(self._row_path(row), result, writes=self._writes)


def clean_up(folder: Path) -> None:
    """Delete what a finished run needs no more, and draw its picture if that is missing: what a process still had to do
    that was stopped right after it had written the result."""
    for name in (CHECKPOINTS, STAGES):
        shutil.rmtree(folder / name, ignore_errors=True)
    _remove_leftovers(folder)
    if not (folder / "matrix.png").exists():
        tasks, matrix = read_matrix(folder / "matrix.csv")
        save_matrix_picture(folder / "matrix.png", matrix, tasks, title=folder.name)


def _remove_leftovers(folder: Path) -> None:
    """Of a process killed while it wrote; a run's folder has one writer, who holds its lock."""
    for leftover in folder.glob("*.partial"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    if (folder / "model.old").exists() and (folder / "model").exists():
        shutil.rmtree(folder / "model.old")
