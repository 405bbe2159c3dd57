# SPDX-License-Identifier: Apache-2.0
"""Real processes and real signals: Ctrl-C and SIGTERM leave a checkpoint, a sentence and the command that goes on."""

import contextlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from dmole.config import load_config
from dmole.runs.interruption import StopSignals
from dmole.runs.runner import run

FAST = [
    "--model", "tiny", "--method", "seq_ft", "--seed", "0", "--set", "threads=1", 
    "--set", "training.per_device_train_batch_size=1",
    "--set", "evaluation.max_new_tokens=3", "--set", "lora.rank=4", "--set", "heartbeat_seconds=0.05",
    "--set", "lora.dropout=0.2", "--set", "training.num_train_epochs=8", "--set", "training.save_strategy=no",
]  # fmt: skip
COMPARED = ("matrix.csv", "predictions.jsonl.gz", "losses.csv")
ROOT = Path(__file__).resolve().parents[3]


@contextlib.contextmanager
def started(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    """`dmole` with these arguments in a process of its own, which ends with the block."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "dmole", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], pattern: str) -> list[str]:
    """Lines of stdout up to the first that matches."""
    assert process.stdout is not None
    seen: list[str] = []
    for line in process.stdout:
        seen.append(line)
        if re.search(pattern, line):
            return seen
    _, errors = process.communicate()
    raise AssertionError(f"no line has {pattern!r}: {seen} {errors}")


def last_lines(errors: str) -> tuple[str, str]:
    said = [line for line in errors.splitlines() if line.strip()]
    return said[-2], said[-1]


@pytest.mark.slow
def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(toy_folder: Path, tmp_path: Path) -> None:
    overrides = [
        f"stream={toy_folder}", "model=tiny", "methods=seq_ft", f"output={tmp_path / 'undisturbed'}",
        *(FAST[place + 1] for place, word in enumerate(FAST) if word == "--set"),
    ]  # fmt: skip
    undisturbed = run(load_config(overrides=overrides), console=Console(file=io.StringIO()))

    output = tmp_path / "out"
    command = ["run", str(toy_folder), "-o", str(output), *FAST, "--fresh"]
    for number, name, line in (
        (signal.SIGINT, "SIGINT", r"stage 1/3 colours: step [1-9]\d*/80, loss"),
        (signal.SIGTERM, "SIGTERM", r"stage 2/3 letters: step [1-9]\d*/80, loss"),
    ):
        with started(command) as process:
            shown = "".join(read_until(process, line))
            process.send_signal(number)
            _, errors = process.communicate(timeout=120)
        # On a machine without a terminal there is a line while a stage trains, and a first estimate before it.
        assert re.search(r"seq_ft-seed0-default: stage \d/3 \w+: step \d+/80, loss \d+\.\d+, \d+:\d\d left\n", shown)
        assert re.search(r"estimate: \d+:\d\d on cpu for 240 training steps and 48 answers, [\d.]+ GiB", shown)
        assert process.returncode == 128 + number, errors
        assert "Traceback" not in errors
        assert "stopping: the step in progress ends and a checkpoint is saved (once more: stop at once)" in errors
        sentence, go_on = last_lines(errors)
        task = re.search(r"stage (\d)/3 (\w+)", line)
        assert task is not None
        assert re.fullmatch(
            rf"stopped by {name}: seq_ft-seed0-default after step (\d+) of 80 of stage {task[1]} of 3 \({task[2]}\); "
            r"a checkpoint is saved\. Go on with:",
            sentence,
        ), sentence
        assert len(list(output.glob("runs/*/checkpoints/*/manifest.json"))) == 1
        words = shlex.split(go_on)
        assert words[0] == "dmole" and words[-1] == "--resume" and "--fresh" not in words
        command = words[1:]
        stopped = re.search(r"step (\d+) of 80 of stage (\d)", sentence)
    assert stopped is not None
    screen = io.StringIO()
    run(load_config(overrides=[*overrides, f"output={output}"]), console=Console(file=screen, width=200))
    note = f"seq_ft-seed0-default: goes on after step {stopped[1]} of 80 of stage 2 of 3 (letters)"
    assert note in screen.getvalue().splitlines()
    for name in COMPARED:
        file = Path("runs") / "seq_ft-seed0-default" / name
        assert (output / file).read_bytes() == (undisturbed / file).read_bytes(), name


def test_typers_silent_status_is_put_into_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dmole.cli import INTERRUPTED, status

    def interrupted(**given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dmole.cli.run_config", interrupted)
    monkeypatch.setattr("dmole.doctor.examine", interrupted)
    assert status(["run", "my stream", "--fresh"]) == INTERRUPTED
    assert capsys.readouterr().err.splitlines() == [
        "interrupted. What came after the last checkpoint is done again by:",
        "  dmole run 'my stream' --resume",
    ]
    assert status(["doctor"]) == INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


def test_handlers_are_put_back_and_an_ignored_signal_stays_ignored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested == signal.SIGTERM
            assert str(stop.interrupted("here")) == "stopped by SIGTERM: here"
            with pytest.raises(SystemExit) as ended:
                os.kill(os.getpid(), signal.SIGTERM)
            assert ended.value.code == 143
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_sigint_is_the_usual_one() -> None:
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
