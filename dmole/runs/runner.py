# SPDX-License-Identifier: Apache-2.0
"""`run(config)`: every method, seed and order over the stages of a stream, evaluated after each one, resumable.

    prepare   read stream and model, build every method once, check everything that can be wrong
    for order, seed, method:
        row 0                     the pretrained model on all test sets (once per model and stream)
        for stage in method.stages(stream):
            begin_stage           checkpoint       phase "train", step 0
            steps                 checkpoint every `training.save_steps`
            end_stage             checkpoint       phase "evaluate"
            evaluation            stages/<row>.json, checkpoint       phase "begin" of the next stage
        results                   see `dmole.reports.run_files`

A process killed anywhere goes on from the last checkpoint and meets the same numbers, because everything random is
seeded by name (`dmole.seeding`) or saved (the optimizer, dropout's random state). The number of threads is a setting,
and what is cached does not depend on who computed it (`dmole.arithmetic`): the same configuration gives the same bytes
on one machine, whatever the caches hold, however many cores there are and however busy they are.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console

from dmole.config import RunConfig
from dmole.data.sample import Stream
from dmole.machine import usable_cores
from dmole.methods.base import Stage
from dmole.models.vision_language import VisionLanguageModel
from dmole.reports.run_files import write_summary
from dmole.runs.dry_run import cuts, description
from dmole.runs.estimate import estimate, measure
from dmole.runs.interruption import StopSignals
from dmole.runs.locks import locked, summary_lock
from dmole.runs.plan import RunPlan, check_folder, check_plan, check_samples, plan_runs, work_units
from dmole.runs.progress import Costs, RunProgress
from dmole.runs.rows import SHARED_ROWS
from dmole.runs.single_run import SingleRun, clean_up
from dmole.sources import check_named, limited, open_model, open_stream
from dmole.training.acceleration import make_accelerator, place


def run(
    config: RunConfig,
    *,
    console: Console | None = None,
    fresh: bool = False,
    dry_run: Callable[[Stream], list[str]] | None = None,
) -> Path:
    """Run everything `config` asks for and return its output folder; finished runs are kept, half-done ones resumed.

    Args:
        fresh: delete earlier runs of the same names first, and the shared row 0, which other code may have measured.
        dry_run: check everything, print samples, steps, weights and the estimate, and train and write nothing. What
            it returns for the stream is printed first: how the stream differs from a recipe's.

    Raises ValueError (`ConfigError`, `DataError`, `CheckpointError`) before any training for whatever cannot be run,
    and `dmole.runs.interruption.Interrupted` after SIGINT or SIGTERM, once a checkpoint is saved.
    """
    check_named(config)
    console = console or Console()
    output = Path(config.output)
    with torch_settings(config), contextlib.ExitStack() as held:
        accelerator = make_accelerator(config.training)
        if not accelerator.is_main_process:
            console = Console(quiet=True)
        # What the first process builds and caches, the others read.
        with accelerator.main_process_first():
            model = open_model(config)
            whole = open_stream(config.stream, console, rows=config.rows)
        stream = limited(whole, config)
        for line in cuts(whole, stream):
            console.print(line, highlight=False, soft_wrap=True, markup=False)
        place(model.model, accelerator)
        processes = accelerator.num_processes
        plans = plan_runs(config, stream, model, processes=processes)
        check_samples(stream, model, config.evaluation.max_new_tokens)
        stages = {plan.folder: check_plan(plan, config, model) for plan in plans}
        if dry_run is not None:
            for line in (*dry_run(whole), *description(plans, stages, config, model, processes=processes)):
                console.print(line, highlight=False, soft_wrap=True, markup=False)
            announce(plans, stages, config, model, console)
            return output
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            held.enter_context(locked(output, [plan.folder.name for plan in plans]))
        if fresh and accelerator.is_main_process:
            for plan in plans:
                shutil.rmtree(plan.folder, ignore_errors=True)
            shutil.rmtree(output / SHARED_ROWS, ignore_errors=True)
        accelerator.wait_for_everyone()
        for plan in plans:
            check_folder(plan)
        accelerator.wait_for_everyone()  # before one of them writes
        if config.threads < (cores := usable_cores()):
            console.print(
                f"threads={config.threads} on {cores} cores; more may be faster, and the numbers depend on it",
                highlight=False,
            )
        left = [plan for plan in plans if not (plan.folder / "result.json").exists()]
        costs = announce(left, stages, config, model, console) if left else Costs()
        units = {
            plan.folder: work_units(stages[plan.folder], plan.stream, config, costs, processes=processes)
            for plan in plans
        }
        progress = RunProgress(console, sum(units.values()), costs=costs, heartbeat_seconds=config.heartbeat_seconds)
        with progress, StopSignals() as stop:
            for plan in plans:
                check_folder(plan)
                if (plan.folder / "result.json").exists():
                    progress.skip(units[plan.folder])
                    if accelerator.is_main_process:
                        clean_up(plan.folder)
                    progress.note(f"{plan.folder.name}: finished earlier, kept")
                    continue
                if stop.requested is not None:
                    raise stop.interrupted(f"before {plan.folder.name}; the runs before it are finished.")
                SingleRun(plan, config, model, progress, stop).run()
                if accelerator.is_main_process:
                    summarize(output, console)
        if accelerator.is_main_process:
            summarize(output, console)
        accelerator.wait_for_everyone()
    return output


def summarize(output: Path, console: Console) -> None:
    """summary.csv and profile.csv; a run that cannot be read is named and left out."""
    with summary_lock(output):
        for leftover in output.glob("*.csv.*.partial"):
            leftover.unlink()  # of a process killed while it wrote them
        for damaged in write_summary(output):
            console.print(f"warning: {damaged}", highlight=False, soft_wrap=True, markup=False)


def announce(
    plans: Sequence[RunPlan],
    stages: dict[Path, list[Stage]],
    config: RunConfig,
    model: VisionLanguageModel,
    console: Console,
) -> Costs:
    """Print what the runs will cost, and what they would cost too much of; the measured costs of their work."""
    rates = measure(model, plans[0].stream, config)
    expected = estimate(plans, stages, config, model, rates)
    console.print(str(expected), highlight=False, soft_wrap=True)
    for shortage in expected.shortages(Path(config.output)):
        console.print(f"warning: {shortage}", highlight=False, soft_wrap=True, markup=False)
    return rates.costs


@contextlib.contextmanager
def torch_settings(config: RunConfig) -> Iterator[None]:
    """Deterministic algorithms and the thread count, put back afterwards."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    rng = torch.get_rng_state()
    try:
        torch.set_num_threads(config.threads)
        torch.use_deterministic_algorithms(True)
        # Filling every torch.empty costs time and hides nothing here: no result reads memory that was not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.set_rng_state(rng)
