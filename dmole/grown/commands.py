# SPDX-License-Identifier: Apache-2.0
"""The commands that use what a run has left: `dmole ask`, `serve`, `export`, `forget`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunArgument = Annotated[Path, typer.Argument(help="The folder of a finished run, or of its model.")]
BaseOption = Annotated[str | None, typer.Option(help="Where the base model is now; default: where the run had it.")]
DeviceMapOption = Annotated[str | None, typer.Option(help="Such as auto or cuda:0; default: the CPU.")]
DtypeOption = Annotated[str | None, typer.Option(help="Of the base model, such as bfloat16; default: the run's.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("ask")(ask)
    app.command("serve")(serve)
    app.command("export")(export)
    app.command("forget")(forget)


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
    from dmole.grown import serving

    grown = dmole.load(run, base=base, device_map=device_map, dtype=dtype)
    print(f"http://{host}:{port}/v1/chat/completions answers for {', '.join(grown.tasks)}; Ctrl-C ends it", flush=True)
    serving.serve(grown, host=host, port=port, limits=serving.ServingLimits(max_batch=max_batch))


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
