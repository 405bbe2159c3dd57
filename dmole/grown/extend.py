# SPDX-License-Identifier: Apache-2.0
"""One more task on a finished run, which stays as it is: a new run whose first N stages are those of the old one.

    saved model, stored rows  ->  a checkpoint before stage N + 1  ->  `SingleRun`, as for any run that goes on

The new stage trains with the old run's settings, so for methods that only add (D-MoLE, Finetune) the experts, the
router and the last row are, byte for byte, those of a run that had the task from the start. The rows before were
measured without the new task: its cells there are empty, unless `backfill` measures them on the model as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from rich.console import Console

from dmole.config import RunConfig
from dmole.config_error import ConfigError
from dmole.data.sample import Stream
from dmole.grown.finished_run import FinishedRun, joined, read_finished, read_task
from dmole.grown.loading import open_saved, restore
from dmole.methods.base import Method, Stage
from dmole.models.vision_language import VisionLanguageModel
from dmole.profile import Profile
from dmole.reports.stored import read_json, read_run
from dmole.runs import checkpoint
from dmole.runs.evaluation import Evaluation, evaluate, generation_queue
from dmole.runs.interruption import StopSignals
from dmole.runs.locks import locked
from dmole.runs.plan import RunPlan, check_plan, check_samples, fresh_copy, plan_runs, work_units
from dmole.runs.position import CHECKPOINTS, save_position
from dmole.runs.progress import Costs, RunProgress
from dmole.runs.results import write_run_settings
from dmole.runs.rows import read_sealed, write_row, write_sealed, zero_shot_row
from dmole.runs.runner import announce, summarize, torch_settings
from dmole.runs.single_run import STAGES, SingleRun, clean_up
from dmole.sources import limited
from dmole.training.acceleration import make_accelerator, place
from dmole.training.stage_training import stage_steps


def extend(
    run: str | Path,
    task_folder: str | Path,
    *,
    output: str | Path,
    backfill: bool = False,
    base: str | None = None,
    console: Console | None = None,
) -> Path:
    """Learn one more task on a finished run; returns the folder of the new run, a run like any other.

    The same call after a kill goes on where it stopped; after the end it changes nothing.

    Args:
        run: the folder of the run, or an output folder with one run.
        task_folder: a folder with a stream.yaml that lists one task.
        output: a new output folder; runs of other methods that were extended by the same task may be in it.
        backfill: measure the new task's cells of the earlier rows too. Its samples are answered in the batches in which
            a run from the start would have had them, so every row costs up to the answers of all tasks.
        base: where the base model is now; None is the folder or hub id that the run used.

    Raises:
        SavedModelError: for a damaged run, one whose model was changed since, another base, data or metric.
        ValueError: before any training, for a task whose name is taken or whose data cannot be used, a method that does
            not learn task after task, `backfill` of a method that keeps nothing of what it was, an output folder that
            is the run's own or holds another run.
        dmole.runs.interruption.Interrupted: after SIGINT or SIGTERM, once a checkpoint is saved.
    """
    console = console or Console()
    finished = read_finished(Path(run), console)
    folder = Path(task_folder).resolve()
    new = limited(read_task(folder), finished.config)
    name = new.task_names[0]
    if name in finished.stream.task_names:
        names = ", ".join(finished.stream.task_names)
        raise ValueError(f"task: got {name!r}, which {finished.folder} has learned ({names}); expected a new name.")
    if Path(output).resolve() == finished.folder.resolve().parent.parent:
        raise ConfigError(f"output: got {output}, where the run itself is; expected a new folder. Choose another.")
    with torch_settings(finished.config), contextlib.ExitStack() as held:
        accelerator = make_accelerator(finished.config.training)
        if not accelerator.is_main_process:
            console = Console(quiet=True)
        with accelerator.main_process_first():
            model = open_saved(finished.saved, base=base, device_map=finished.config.device_map)
        place(model.model, accelerator)
        finished.check(model, processes=accelerator.num_processes)
        stream = joined([finished.stream, new])
        plan, config = _plan(finished, stream, folder, model, Path(output), backfill, accelerator.num_processes)
        check_samples(new, model, config.evaluation.max_new_tokens)
        stages = check_plan(plan, config, model)
        _check_protocol(plan, stages)
        extension = _Extension(finished, plan, config, model, stages, accelerator)
        if backfill:
            extension.check_backfill()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            held.enter_context(locked(Path(config.output), [plan.folder.name]))
        accelerator.wait_for_everyone()
        if (plan.folder / "result.json").exists():
            if accelerator.is_main_process:
                clean_up(plan.folder)
            console.print(f"{plan.folder.name}: finished earlier, kept", highlight=False, markup=False)
        else:
            extension.run(console, backfill=backfill)
        if accelerator.is_main_process:
            summarize(Path(config.output), console)
            _say_what_is_empty(plan, console)
        accelerator.wait_for_everyone()
    return plan.folder


def _plan(
    finished: FinishedRun,
    stream: Stream,
    task_folder: Path,
    model: VisionLanguageModel,
    output: Path,
    backfill: bool,
    processes: int,
) -> tuple[RunPlan, RunConfig]:
    """The plan and configuration of the longer run. ConfigError where its folder holds another one."""
    order = "default" if finished.stored.order == "default" else ",".join(stream.task_names)
    config = finished.config.replace(output=str(output), orders=(order,))
    (plan,) = plan_runs(config, stream, model, processes=processes)
    # Its earlier cells are not those of a run from the start, so it is another run.
    identity = {
        **plan.identity,
        "extends": {"fingerprint": finished.document["fingerprint"], "backfill": backfill},
    }
    extends = {"run": str(finished.folder.resolve()), "tasks": [*finished.added, str(task_folder)]}
    plan = dataclasses.replace(plan, identity=identity, extends=extends)
    settings = plan.folder / "config.json"
    if settings.exists() and read_json(settings).get("fingerprint") != plan.fingerprint:
        raise ConfigError(f"output: {plan.folder} holds another run; expected a new folder. Choose another --output.")
    return plan, config


def _check_protocol(plan: RunPlan, stages: Sequence[Stage]) -> None:
    """Raise ValueError for a method that does not learn one task after another."""
    if tuple(stage.task.name for stage in stages) != plan.stream.task_names:
        why = f"trains on {', '.join(stage.task.name for stage in stages)}" if stages else "trains nothing"
        raise ValueError(
            f"run: got one of {plan.method}, which {why}, not task after task; expected a method with one stage per "
            f"task. Run {plan.method} anew on the whole stream."
        )


class _Extension:
    """A plan with the finished run that it goes on from."""

    def __init__(
        self,
        finished: FinishedRun,
        plan: RunPlan,
        config: RunConfig,
        model: VisionLanguageModel,
        stages: Sequence[Stage],
        accelerator: Accelerator,
    ) -> None:
        self.finished = finished
        self.plan = plan
        self.config = config
        self.model = model
        self.stages = stages
        self.accelerator = accelerator
        self.task = plan.stream.tasks[-1]
        self.method: Method = restore(finished.saved, fresh_copy(model))
        self.old_rows = finished.rows()
        processes = accelerator.num_processes
        self.position = finished.position(
            [stage_steps(config.training, stage, processes=processes) for stage in stages]
        )
        # The rows that the old run has, and in which the method's protocol tests the new task.
        protocol = self.method.stages(plan.stream)[:-1]
        planned = [0, *(stage.row for stage in protocol if self.task.name in stage.evaluates)]
        self.fillable = [row for row in planned if row in self.old_rows]

    def check_backfill(self) -> None:
        """Raise ValueError where a row before the last cannot be measured any more."""
        if any(row > 0 for row in self.fillable):
            self.method.as_of(self.plan.stream.task_names[:1])

    def run(self, console: Console, *, backfill: bool) -> None:
        """From wherever the folder stands to its results."""
        plan, config = self.plan, self.config
        tests = len(self.fillable) if backfill else 0
        costs = self._announce(console, tests)
        answers = sum(len(task.test) for task in plan.stream.tasks)
        total = work_units(self.stages, plan.stream, config, costs, processes=self.accelerator.num_processes)
        total += costs.answer * tests * answers
        progress = RunProgress(console, total, costs=costs, heartbeat_seconds=config.heartbeat_seconds)
        with progress, StopSignals() as stop:
            if checkpoint.latest(plan.folder / CHECKPOINTS) is None:
                self._begin(progress, stop, self.fillable if backfill else ())
            SingleRun(plan, config, self.model, progress, stop).run()

    def _announce(self, console: Console, tests: int) -> Costs:
        """Print what the new stage and the backfilled tests cost; the measured costs of their work."""
        last = self.stages[-1]
        work = dataclasses.replace(last, evaluates=last.evaluates + tests * self.plan.stream.task_names)
        config = self.config.replace(evaluation=dataclasses.replace(self.config.evaluation, zero_shot=False))
        return announce([self.plan], {self.plan.folder: [work]}, config, self.model, console)

    def _begin(self, progress: RunProgress, stop: StopSignals, fill: Sequence[int]) -> None:
        """Write the checkpoint of a run that stands before its last stage. Without one, all of it is done again."""
        plan, writes = self.plan, self.accelerator.is_main_process
        if writes:
            plan.folder.mkdir(parents=True, exist_ok=True)
            write_run_settings(plan, self.config, self.accelerator)
        position = self.position
        rows, profile = dict(self.old_rows), Profile()
        for row in fill:
            rows[row] = _with(rows[row], self._measured(row, profile, progress, stop))
        for part, seconds in profile.seconds.items():
            position.profile[part] = position.profile.get(part, 0.0) + seconds
        for row, result in rows.items():
            position.rows[str(row)] = write_row(plan.folder / STAGES / f"{row}.json", result, writes=writes)
        save_position(plan, position, self.method, None, writes)
        self.accelerator.wait_for_everyone()

    def _measured(self, row: int, profile: Profile, progress: RunProgress, stop: StopSignals) -> Evaluation:
        """The new task's cell of an earlier row, from its file if an earlier process has measured it."""
        file = self.plan.folder / STAGES / f"backfill-{row}.json"
        tasks = sorted(self.plan.stream.tasks, key=lambda task: task.name)
        if file.exists():
            progress.skip(progress.costs.answer * sum(len(task.test) for task in tasks))
            return read_sealed(file)
        progress.describe(f"{self.plan.folder.name}: row {row} of {self.task.name}")

        def after_batch(answers: int) -> None:
            progress.advance(progress.costs.answer * answers)
            if stop.requested is not None:
                raise stop.interrupted(f"{self.plan.folder.name} in the test of row {row}, which starts again.")

        if row == 0:
            whole = zero_shot_row(self.plan, self.config, self.model, after_batch=after_batch)
            result = _only(whole, self.task.name)
        else:
            queue = generation_queue(self.model, tasks, self.config.evaluation.per_device_eval_batch_size)
            needed = [batch for batch in queue if any(name == self.task.name for name, _ in batch)]
            with self.method.as_of(self.plan.stream.task_names[:row]):
                result = evaluate(
                    self.method, [self.task], needed, self.config.evaluation, self.accelerator, profile=profile,
                    after_batch=after_batch,
                )  # fmt: skip
        if self.accelerator.is_main_process:
            write_sealed(file, result)
        self.accelerator.wait_for_everyone()
        return result


def _only(result: Evaluation, task: str) -> Evaluation:
    """One cell of a row."""
    return Evaluation(
        points={task: result.points[task]},
        well_formed={task: result.well_formed[task]},
        cut={task: result.cut[task]},
        predictions=tuple(prediction for prediction in result.predictions if prediction.task == task),
    )


def _with(row: Evaluation, cell: Evaluation) -> Evaluation:
    """The row with one more cell."""
    return Evaluation(
        points={**row.points, **cell.points},
        well_formed={**row.well_formed, **cell.well_formed},
        cut={**row.cut, **cell.cut},
        predictions=(*row.predictions, *cell.predictions),
    )


def _say_what_is_empty(plan: RunPlan, console: Console) -> None:
    task = plan.stream.task_names[-1]
    rows = sorted(row for row, name in read_run(plan.folder).not_measured if name == task)
    if rows:
        console.print(
            f"{task}: not measured in rows {', '.join(map(str, rows))}, from before it was there",
            highlight=False, soft_wrap=True, markup=False,
        )  # fmt: skip
