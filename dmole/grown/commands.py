# SPDX-License-Identifier: Apache-2.0
"""The commands that use what a run has left: `dmole ask`, `serve`, `export`, `forget`, `extend`, `import`.

Imports happen inside the commands: torch takes seconds, and `dmole --help` should not.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

RunArgument = Annotated[Path, typer.Argument(help="The folder of a finished run, or of its model.")]
TaskFolderOption = Annotated[Path, typer.Option("--task", help="A folder with a stream.yaml that lists one task.")]
BaseOption = Annotated[str | None, typer.Option(help="Where the base model is now; default: where the run had it.")]
DeviceMapOption = Annotated[str | None, typer.Option(help="Such as auto or cuda:0; default: the CPU.")]
DtypeOption = Annotated[str | None, typer.Option(help="Of the base model, such as bfloat16; default: the run's.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("ask")(ask)
    app.command("serve")(serve)
    app.command("export")(export)
    app.command("forget")(forget)
    app.command("extend")(extend_command)
    app.command("import")(import_command)


def ask(
    run: RunArgument,
    words: Annotated[
        list[str] | None, typer.Argument(help="Pictures, then the question.", metavar="[IMAGE]... TEXT")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="The task whose expert answers; default: the router's choice.")
    ] = None,
    each_task: Annotated[
        bool, typer.Option("--each-task", help="Ask the first test question of each task of the run's stream.")
    ] = False,
    max_new_tokens: Annotated[int | None, typer.Option(help="The longest answer; default: the run's.")] = None,
    base: BaseOption = None,
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Ask the model of a finished run; prints the answer, and which experts it used and why."""
    import dmole
    from dmole.grown.asking import ask_each_task

    if bool(words) == each_task:
        got = "both" if words else "neither"
        raise ValueError(f"TEXT, --each-task: got {got}; expected a question, or --each-task. Give one of them.")
    grown = dmole.load(run, base=base, device_map=device_map, dtype=dtype)
    changes = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    if each_task:
        for line in ask_each_task(grown, run, **changes):
            print(line)
        return
    assert words
    answer = grown.answer(images=words[:-1], text=words[-1], task=task, **changes)
    print(
        answer.text + (f"  [cut at {max_new_tokens or grown.generation.max_new_tokens} tokens]" if answer.cut else "")
    )
    print(f"route: {answer.route}")


def serve(
    run: RunArgument,
    host: Annotated[str, typer.Option(help="Anything but loopback opens the model to other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port that the server listens on.")] = 8000,
    max_batch: Annotated[int, typer.Option(help="Requests that are answered together.")] = 16,
    base: BaseOption = None,
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Serve the model of a finished run: OpenAI's /v1/chat/completions, requests of all tasks in one batch."""
    import dmole

    try:
        from dmole.grown.serving import ServingLimits
        from dmole.grown.serving import serve as answer_requests
    except ModuleNotFoundError as error:
        raise ImportError(f"serve: {error}; run pip install 'dmole[serve]'.") from error
    grown = dmole.load(run, base=base, device_map=device_map, dtype=dtype)
    print(f"http://{host}:{port}/v1/chat/completions answers for {', '.join(grown.tasks)}; Ctrl-C ends it", flush=True)
    answer_requests(grown, host=host, port=port, limits=ServingLimits(max_batch=max_batch))


def export(
    run: RunArgument,
    task: Annotated[str, typer.Option(help="The task whose expert is exported.")],
    to: Annotated[Path, typer.Option(help="A folder that does not exist yet.")],
    pair: Annotated[str | None, typer.Option(help="A second task: the sum of both experts as one adapter.")] = None,
    language_only: Annotated[
        bool, typer.Option("--language-only", help="Leave out the layers of the vision tower.")
    ] = False,
) -> None:
    """Write a task's expert as a stock PEFT LoRA folder, which PEFT, vLLM and SGLang load."""
    from dmole.grown.export import export as export_experts

    folder, warnings = export_experts(run, [task] if pair is None else [task, pair], to, language_only=language_only)
    for warning in warnings:
        print(f"warning: {warning}")
    print(f"{folder}: PeftModel.from_pretrained(base, {str(folder)!r})")


def forget(
    run: RunArgument,
    task: Annotated[str, typer.Option(help="The task that is forgotten.")],
    keep_weights: Annotated[
        bool, typer.Option("--keep-weights", help="Take its expert out of the routing only.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Take a task out of the model of a run, after showing who depends on it."""
    from dmole.grown.forget import consequences
    from dmole.grown.forget import forget as forget_task

    print(consequences(run, task))
    if not yes:
        typer.confirm("Forget it?", abort=True)
    folder = forget_task(run, task, keep_weights=keep_weights)
    print(f"{folder}: {task} is {'out of the routing' if keep_weights else 'gone'}")


def extend_command(
    run: RunArgument,
    task: TaskFolderOption,
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
    task: TaskFolderOption,
    to: Annotated[Path | None, typer.Option(help="A new folder for the model; without it RUN's own changes.")] = None,
) -> None:
    """Make a stock PEFT LoRA the expert of a new task; its router learns from the train split of the task's folder."""
    from dmole.grown.import_expert import import_expert

    folder, notes = import_expert(run, lora, task, to=to)
    for note in notes:
        print(f"warning: {note}")
    print(f"model: {folder}")
