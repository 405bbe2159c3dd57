# SPDX-License-Identifier: Apache-2.0
"""Kill a run with SIGKILL at random moments, resume it each time, and compare with the run nobody disturbed.

    python scripts/kill_resume.py --config config.yaml --kills 10 --output results/kill_resume.json

--inside-writes adds kills at random file operations of the run (open, rename, delete, fsync ...), because a random
moment is seldom one inside the write of a checkpoint.

Both runs happen in processes of their own, forked from a server that has imported everything once. What must be equal,
byte for byte: matrix.csv, predictions.jsonl.gz, references.jsonl.gz and losses.csv of every run. Exit status 1 if
anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import multiprocessing.util
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dmole.config import RunConfig, build_config, load_config
from dmole.recipes import RECIPES
from dmole.runs.environment import describe_environment

COMPARED = ("matrix.csv", "predictions.jsonl.gz", "references.jsonl.gz", "losses.csv")


# Of a whole run: how late a kill may come after a start.
SPAN = 0.7

FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def kill_at(folder: Path, number: int, *, counter: Path | None = None) -> None:
    """SIGKILL this process right before its file operation number `number` below `folder`, from 1; 0 never.

    counter: a file that gets the count when the process ends by itself.
    """
    seen, below = 0, str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in FILE_EVENTS and any(isinstance(a, str | Path) and str(a).startswith(below) for a in arguments):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    if counter is not None:
        multiprocessing.util.Finalize(None, lambda: counter.write_text(str(seen)), exitpriority=1)


def worker(plain: dict[str, Any], event: int = 0, counter: Path | None = None) -> None:
    """The process that is killed: a run, as `dmole run` makes it."""
    from dmole.runs.runner import run

    kill_at(Path(plain["output"]), event, counter=counter)
    run(build_config(plain))


def _nothing() -> None:
    pass


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dmole.runs.runner", "dmole.methods.dmole", "matplotlib.backends.backend_agg"])
    return context


def start(config: RunConfig, event: int = 0, counter: Path | None = None) -> Any:
    """A fresh process on `config`, which kills itself at its file operation number `event` if that is not 0."""
    process = _context().Process(target=worker, args=(config.to_dict(), event, counter))
    process.start()
    return process


def finish(config: RunConfig, counter: Path | None = None) -> float:
    """Run to the end; seconds it took."""
    began = time.monotonic()
    process = start(config, counter=counter)
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"the run ended with status {process.exitcode}; its error is above.")
    return time.monotonic() - began


def position(output: Path) -> str:
    """Where the newest checkpoint stands, for the record."""
    found = sorted(output.glob("runs/*/checkpoints/[0-9]*/position.json"), key=lambda path: path.stat().st_mtime)
    finished = len(list(output.glob("runs/*/result.json")))
    if not found:
        return f"{finished} runs finished, no checkpoint"
    place = json.loads(found[-1].read_text())
    return f"{finished} runs finished, then {place['phase']} of stage {place['stage'] + 1}"


def kill_and_resume(
    config: RunConfig, kills: int, inside_writes: int, seconds: float, events: int, chance: random.Random, root: Path
) -> tuple[list[dict[str, Any]], list[Path]]:
    """Start, kill after a random while or at a random file operation, start again ...; in the end let it finish.

    events: file operations of a run that nobody disturbs.

    Returns the moments and the output folders. A run that is done before the last kill is followed by another one.
    """
    record: list[dict[str, Any]] = []
    outputs = [root / "disturbed0"]
    plan = [False] * kills + [True] * inside_writes
    chance.shuffle(plan)
    while len(record) < len(plan):
        disturbed = config.replace(output=str(outputs[-1]))
        inside = plan[len(record)]
        # Anywhere in most of a whole run: a process that always ended sooner would never get to its first checkpoint.
        event = chance.randint(1, max(1, round(SPAN * events))) if inside else 0
        wait = chance.uniform(0.0, SPAN * seconds)
        process = start(disturbed, event)
        process.join(None if inside else wait)
        if process.exitcode is None:
            process.kill()
            process.join()
            record.append({"after_seconds": round(wait, 3), "left": position(outputs[-1])})
        elif process.exitcode == -signal.SIGKILL:
            record.append({"at_file_operation": event, "left": position(outputs[-1])})
        elif process.exitcode == 0:
            outputs.append(root / f"disturbed{len(outputs)}")
        else:
            raise SystemExit(f"a resumed run ended with status {process.exitcode}; its error is above.")
    finish(config.replace(output=str(outputs[-1])))
    return record, outputs


def digests(output: Path) -> dict[str, str]:
    """The sha256 of every compared file."""
    return {
        f"{folder.name}/{name}": hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for folder in sorted((output / "runs").iterdir())
        for name in COMPARED
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, help="YAML configuration")
    parser.add_argument("--recipe", choices=sorted(RECIPES), help="start from this recipe")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--inside-writes", type=int, default=0, help="further kills, at random file operations")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--output", type=Path, default=Path("results/kill_resume.json"))
    options = parser.parse_args()
    base = RECIPES[options.recipe]() if options.recipe else None
    config = load_config(options.config, base=base, overrides=options.overrides)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        # The server imports torch and transformers once, before anything is timed.
        warm = _context().Process(target=_nothing)
        warm.start()
        warm.join()
        seconds = finish(config.replace(output=str(root / "calm")), counter=root / "events")
        events = int((root / "events").read_text())
        chance = random.Random(options.seed)
        record, outputs = kill_and_resume(config, options.kills, options.inside_writes, seconds, events, chance, root)
        expected = digests(root / "calm")
        got = [digests(output) for output in outputs]
    different = sorted({name for found in got for name in {*expected, *found} if expected.get(name) != found.get(name)})
    result = {
        "equal": not different,
        "kills": len(record),
        "inside_writes": options.inside_writes,
        "disturbed_runs": len(outputs),
        "different_files": different,
        "files": expected,
        "moments": record,
        "uninterrupted_seconds": round(seconds, 1),
        "config": {**config.to_dict(), "output": "a temporary folder"},
        "environment": describe_environment(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(record)} kills; {'all files equal' if not different else 'different: ' + ', '.join(different)}")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
