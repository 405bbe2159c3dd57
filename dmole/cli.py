# SPDX-License-Identifier: Apache-2.0
"""The command `dmole`. Every error is one clear line on stderr and exit status 2; a failed check exits with 1.

    dmole run STREAM --model M --method NAMES  learn the stream's tasks one after another, test after each
    dmole verify RESULTS                       recompute every stored number
    dmole report RESULTS                       the tables again
    dmole readme README.md --check             tables inside Markdown files against committed results
    dmole tasks check my_stream                find everything wrong with a data set
    dmole tasks import llava data my_stream    make tasks of a published layout
    dmole inspect MODEL --check                towers, candidates and budget of a model; does the contract hold for it?
    dmole config                               every setting with its comment
    dmole doctor                               what is installed, what is missing, what to type
    dmole ask RUN photo.jpg "What is this?"    the answer of the model that a run has left, and which experts it used
    dmole serve RUN                            the same over HTTP, as OpenAI's chat completions
    dmole export RUN --task T --to FOLDER      a task's expert as a stock PEFT folder
    dmole forget RUN --task T                  one task less
    dmole extend RUN --task FOLDER             one more task on a finished run
    dmole import RUN LORA --task FOLDER        a PEFT LoRA becomes an expert of its model

Imports happen inside the commands: torch takes seconds, and `dmole --help` should not.
"""

from __future__ import annotations

import io
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from dmole.grown.commands import register
from dmole.run_options import earlier_runs, planned_runs, recipe_config, run_config, split_names
from dmole.runs.interruption import Interrupted

FAILED = 1
WRONG_INPUT = 2
INTERRUPTED = 130
CLOSED = 141  # 128 + SIGPIPE, as a shell reports of programs whose reader has gone
TRACEBACK = "DMOLE_TRACEBACK"

app = typer.Typer(
    name="dmole",
    help="Continual multimodal instruction tuning: D-MoLE, its baselines, and honest numbers.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
tasks_app = typer.Typer(help="Your own tasks.")
app.add_typer(tasks_app, name="tasks")
register(app)

RecipeOption = Annotated[str | None, typer.Option(help="Start from a recipe's configuration.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file of settings.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="One setting, such as lora.rank=4. May be repeated.")
]

# Click's UsageError, wherever this typer has it from: newer releases carry a copy of click.
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit. `DMOLE_TRACEBACK=1` shows where an error came from."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal's encoding lacks must not end a command.
            stream.reconfigure(errors="backslashreplace")
    try:
        code = status(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # such as `dmole verify ... | head`
        code = CLOSED
        silence = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            # Python flushes both once more when it ends.
            os.dup2(silence, stream.fileno())
    if "RANK" in os.environ:
        # One of several processes. A thread of gloo that frees a tensor while the interpreter shuts down aborts the
        # process, and with a sharded base the threads outlive their process group (torch 2.13).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def status(arguments: Sequence[str] | None = None) -> int:
    """The exit status of a command line (sys.argv by default); messages go to stderr."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = app(args=given, prog_name="dmole", standalone_mode=False)
    except USAGE_ERROR as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "dmole"
        text = " ".join(str(getattr(error, "format_message", error.__str__)()).split())
        return _fail(f"{path}: {text} Type '{path} --help'.", WRONG_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(_interrupted(given), INTERRUPTED)
    except ValueError as error:
        return _fail(f"error: {error}", WRONG_INPUT)
    except ImportError as error:
        return _fail(f"error: {error} (`dmole doctor` lists what is missing)", WRONG_INPUT)
    except Interrupted as error:
        return _fail(f"{error} Go on with:\n{_resuming(given)}", 128 + error.number)
    except BrokenPipeError:
        raise
    except OSError as error:
        named = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        return _fail(f"error: {named}", WRONG_INPUT)
    if code == INTERRUPTED:
        # typer turns KeyboardInterrupt into this status without a word.
        return _fail(_interrupted(given), INTERRUPTED)
    return code if isinstance(code, int) else 0


def _interrupted(arguments: Sequence[str]) -> str:
    if arguments[:1] not in (["run"], ["extend"]):
        return "interrupted"
    return f"interrupted. What came after the last checkpoint is done again by:\n{_resuming(arguments)}"


def _resuming(arguments: Sequence[str]) -> str:
    """The command that goes on with an interrupted run."""
    kept = [argument for argument in arguments if argument not in ("--fresh", "--resume")]
    # `extend` goes on by itself.
    return "  " + shlex.join(["dmole", *kept, *(["--resume"] if arguments[:1] == ["run"] else [])])


def _fail(text: str, code: int) -> int:
    if os.environ.get(TRACEBACK):
        traceback.print_exc()
    print(text, file=sys.stderr)
    return code


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"dmole {installed('dmole')}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


# -- run -------------------------------------------------------------------------------------------------------------


@app.command()
def run(
    stream: Annotated[str | None, typer.Argument(help="A folder with stream.yaml, or a registered name.")] = None,
    method: Annotated[list[str] | None, typer.Option("--method", "-m", help="Methods, comma-separated.")] = None,
    seed: Annotated[list[str] | None, typer.Option("--seed", help="Seeds, comma-separated.")] = None,
    order: Annotated[
        list[str] | None,
        typer.Option(help="Task order: default, reversed, shuffled<k> or all names with commas. May be repeated."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A folder or hub id of a vision-language model, or a registered name.")
    ] = None,
    recipe: RecipeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Where results go.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in the output folder.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete earlier runs of the same names first.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, count samples, steps and weights; train nothing.")
    ] = False,
) -> None:
    """Learn the tasks of a stream one after another with each method, testing all tasks after every stage.

    Settings come from the recipe, then --config, then the options, then --set; the last one wins. The stream, the model
    and the methods have no default: they are given, or a recipe sets them.
    """
    if resume and fresh:
        raise ValueError("--resume and --fresh were both given; expected at most one of them. Drop one.")
    chosen = run_config(
        stream=stream,
        methods=method,
        seeds=seed,
        orders=order,
        model=model,
        recipe=recipe,
        config=config,
        settings=settings or [],
        output=output,
    )
    if dry_run:
        from dmole.published import layout_findings
        from dmole.runs.runner import run as check_all

        check_all(chosen, dry_run=lambda stream: layout_findings(recipe, stream))
        return
    # Of several processes (torchrun) the first one speaks, and it alone looks for what is there before it writes.
    first = os.environ.get("RANK", "0") == "0"
    earlier = earlier_runs(chosen) if first else []
    if earlier and not (resume or fresh):
        raise ValueError(
            f"{chosen.output} already holds {', '.join(earlier)}; expected no run of that name. Pass --resume to go on "
            "with it, --fresh to delete it, or another --output."
        )
    from dmole.runs.runner import run as run_all

    console = Console()
    folder = run_all(chosen, console=console, fresh=fresh)
    from dmole.reports.shown import show
    from dmole.reports.stored import read_run
    from dmole.training.processes import leave

    leave()
    if not first:
        return

    # Not every run of the folder: one of them may be damaged, which says nothing about these.
    show(console, [read_run(folder / "runs" / name) for name in sorted(set(planned_runs(chosen)))])
    console.print(f"results: {escape(str(folder))} (pictures: runs/*/matrix.png)", highlight=False, soft_wrap=True)


@app.command("config")
def show_config(
    recipe: RecipeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Print every setting with its comment, as YAML that `dmole run --config` reads back.

    Values are the defaults, then those of the recipe, then --config, then --set.
    """
    from dmole.config import load_config
    from dmole.settings_text import yaml_text

    print(yaml_text(load_config(config, base=recipe_config(recipe), overrides=settings or [])), end="")


# -- results ---------------------------------------------------------------------------------------------------------


@app.command()
def verify(
    results: Annotated[Path, typer.Argument(help="A folder that `dmole run` has written.")],
) -> None:
    """Recompute every aggregate from the matrices and every score from the raw predictions; exit 1 on a difference."""
    from dmole.reports.verify import verify_results

    report = verify_results(results)
    print(report, file=sys.stdout if report.ok else sys.stderr)
    if not report.ok:
        raise typer.Exit(FAILED)


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="A folder that `dmole run` has written.")],
    compare: Annotated[str | None, typer.Option(help="Two methods, with a comma.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables to this Markdown file.")] = None,
    matrices: Annotated[bool, typer.Option("--matrices", help="Show the matrix of every run too.")] = False,
) -> None:
    """Show the tables of a results folder again, and paired differences between two methods."""
    from dmole.reports.shown import show
    from dmole.reports.stored import read_runs

    pair = None if compare is None else split_names("--compare", [compare])
    if pair is not None and len(pair) != 2:
        raise ValueError(
            f"--compare is {compare!r}; expected two methods with a comma between them. Name two of the runs."
        )
    show(Console(), read_runs(results), everything=True, compare=pair, markdown=markdown, matrices=matrices)


@app.command()
def readme(
    files: Annotated[list[Path], typer.Argument(help="Markdown files with result markers.")],
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 if a table is not up to date.")] = False,
) -> None:
    """Make the tables between `<!-- results: ... -->` markers anew from committed results."""
    from dmole.reports.readme import stale, update

    outdated = [path for path in files if (stale(path) if check else update(path))]
    for path in outdated:
        print(f"{path}: {'not up to date; run dmole readme ' + str(path) if check else 'updated'}")
    if check and outdated:
        raise typer.Exit(FAILED)


# -- data and installation -------------------------------------------------------------------------------------------


@tasks_app.command("check")
def check_tasks(
    folder: Annotated[Path, typer.Argument(help="A folder with stream.yaml.")],
    images: Annotated[bool, typer.Option(help="Decode every image (or only see that it exists).")] = True,
    everything: Annotated[bool, typer.Option("--all", help="Show all findings instead of the first 20.")] = False,
) -> None:
    """Find everything wrong with a data set, and what its test splits share with other splits, by file and line."""
    from dmole.data.leaks import LeakFinder
    from dmole.data.reading import SHOWN_PROBLEMS, DataError, read_stream
    from dmole.metrics import METRICS

    leaks = LeakFinder()
    try:
        stream = read_stream(folder, check_images=images, leaks=leaks)
    except DataError as error:
        raise (ValueError(error.text()) if everything else error) from error
    for task in stream.tasks:
        sizes = ", ".join(f"{len(getattr(task, split))} {split}" for split in ("train", "validation", "test"))
        ceiling = METRICS[task.metric].ceiling(task.test)
        print(f"{task.name}: {task.metric}, {sizes}, ceiling {ceiling:.1f}")
    for note in stream.notes:
        print(f"note: {note}")
    for line in leaks.lines(None if everything else SHOWN_PROBLEMS):
        print(line)
    found = f"{len(leaks.found)} leaks" if leaks.found else "nothing wrong"
    print(f"{stream.name}: {len(stream.tasks)} task{'s' * (len(stream.tasks) != 1)}, {found}")


@tasks_app.command("import")
def import_command(
    layout: Annotated[str, typer.Argument(help="llava, paper, coin, ucit, or one data set: textcaps, iconqa, ...")],
    source: Annotated[Path, typer.Argument(help="The folder of the data set as it was published.")],
    target: Annotated[Path, typer.Argument(help="The folder of the stream, made if it is not there.")],
    images: Annotated[Path | None, typer.Option(help="What image paths are relative to, if not the source.")] = None,
    name: Annotated[str | None, typer.Option(help="What the task is called.")] = None,
    metric: Annotated[str | None, typer.Option(help="What the task is scored by.")] = None,
) -> None:
    """Make tasks of a published layout: rows, task.yaml, stream.yaml, and a report of what was left out and why."""
    from dmole.data.importing import import_tasks

    for report in import_tasks(layout, source, target, images=images, name=name, metric=metric):
        for line in report.lines():
            print(line)
    print(f"{target}: check it with dmole tasks check {shlex.quote(str(target))}")


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A folder or hub id of a vision-language model of transformers.")],
    check: Annotated[
        bool, typer.Option("--check", help="Run the contract test on these weights; exit 1 if it fails.")
    ] = False,
    declaration: Annotated[Path | None, typer.Option(help="YAML file of what the rules cannot find out.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Such as bfloat16; default: as in the checkpoint.")] = None,
    device_map: Annotated[str | None, typer.Option(help="Such as auto or cuda:0; default: the CPU.")] = None,
    quantization: Annotated[str | None, typer.Option(help="int8 (torchao, weights only).")] = None,
    full: Annotated[bool, typer.Option("--full", help="Hash every byte of the weights.")] = False,
) -> None:
    """Show the towers, candidates, rows and budget of a model, and how many weights each method would train on it."""
    from dmole import inspect_model
    from dmole.config import build_config
    from dmole.models.contract import check as contract
    from dmole.models.contract import drawn_probes
    from dmole.sources import open_model

    chosen = {"model": model, "dtype": dtype, "device_map": device_map, "quantization": quantization}
    vlm = open_model(build_config(chosen).replace(declaration=inspect_model.declaration_from(declaration)))
    console = Console()
    inspect_model.show(console, inspect_model.inspect(vlm, full=full))
    if check and not inspect_model.show_findings(console, contract(vlm, drawn_probes(vlm))):
        raise typer.Exit(FAILED)


@app.command()
def doctor() -> None:
    """Say what this installation has, what it lacks, and what to type; exit 1 if something needed is missing."""
    from dmole.doctor import examine

    findings = examine()
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        mark = "ok     " if finding.ok else "missing"
        print(f"{mark} {finding.what:<{width}}  {finding.found}")
        if finding.fix and (not finding.ok or "not installed" in finding.found):
            print(f"        {'':<{width}} -> {finding.fix}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(FAILED)
