# SPDX-License-Identifier: Apache-2.0
"""What `dmole` does with saved models, as commands that `dmole.cli` registers.

    dmole extend RUN --task FOLDER             one more task on a finished run
    dmole import RUN LORA --task FOLDER        somebody's LoRA becomes an expert

Imports happen inside the commands: torch takes seconds, and `dmole --help` should not.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

RunArgument = Annotated[Path, typer.Argument(help="The folder of a finished run, or an output folder with one run.")]
TaskOption = Annotated[Path, typer.Option("--task", help="A folder with a stream.yaml that lists one task.")]


def extend_command(
    run: RunArgument,
    task: TaskOption,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A new folder for the longer run.")] = None,
    backfill: Annotated[bool, typer.Option("--backfill", help="Also test it on the model as it was before.")] = False,
) -> None:
    """Learn one more task on a finished run, which stays as it is; the longer run goes to a new folder.

    The settings are the run's own. The same command goes on after an interruption. Without --output the new folder is
    beside the old one, with the name of the task folder at its end.
    """
    from dmole.grown.extend import extend
    from dmole.reports.shown import show
    from dmole.reports.stored import read_run
    from dmole.training.processes import leave

    console = Console()
    folder = extend(run, task, output=output or _beside(run, task), backfill=backfill, console=console)
    leave()
    if os.environ.get("RANK", "0") == "0":
        show(console, [read_run(folder)])
        console.print(f"results: {escape(str(folder))}", highlight=False, soft_wrap=True)


def _beside(run: Path, task: Path) -> Path:
    from dmole.grown.saved import find

    folder = find(run).resolve().parent
    old = folder.parent.parent if folder.parent.name == "runs" else folder
    return old.with_name(f"{old.name}-{task.resolve().name}")


def import_command(
    run: RunArgument,
    lora: Annotated[Path, typer.Argument(help="A PEFT LoRA folder with adapter_config.json.")],
    task: TaskOption,
    to: Annotated[Path | None, typer.Option(help="A new folder for the model; without it RUN's own changes.")] = None,
) -> None:
    """Make a stock PEFT LoRA the expert of a new task; its router learns from the train split of the task's folder."""
    from dmole.grown.import_expert import import_expert

    folder, notes = import_expert(run, lora, task, to=to)
    for note in notes:
        print(f"warning: {note}")
    print(f"model: {folder}")
