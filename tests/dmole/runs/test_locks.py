# SPDX-License-Identifier: Apache-2.0
"""Two commands never work on one run, and what a killed command left blocks nobody."""

import io
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from dmole.config import RunConfig
from dmole.config_error import ConfigError
from dmole.runs.locks import LOCKS, LockedError, locked
from dmole.runs.runner import run

HOLD = """
import sys
from pathlib import Path
from dmole.runs.locks import locked
with locked(Path(sys.argv[1]), [sys.argv[2]]):
    print("held", flush=True)
    sys.stdin.read()
"""
NAME = "zero_shot-seed0-default"


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of the zero-shot run."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out"), NAME]
    root = Path(__file__).resolve().parents[3]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.mark.parametrize("fresh", [False, True])
def test_a_second_command_on_a_run_is_refused_by_name_and_changes_nothing(
    toy_config: Callable[..., RunConfig], tmp_path: Path, holder: subprocess.Popen[str], fresh: bool
) -> None:
    config = toy_config("methods=[seq_ft, zero_shot]")
    kept = tmp_path / "out" / "runs" / NAME / "config.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("other settings")
    expected = (
        rf"out/runs/{NAME} is in use by process {holder.pid} on {platform.node()}; expected one command at a time on a "
        r"run\. Wait until it ends, stop it, or choose another --output\."
    )
    with pytest.raises(LockedError, match=expected):
        run(config, console=quiet(), fresh=fresh)
    assert kept.read_text() == "other settings"
    assert [path.name for path in (tmp_path / "out" / "runs").iterdir()] == [NAME]
    with locked(tmp_path / "out", ["seq_ft-seed0-default"]):
        pass  # the refused command holds none of its other locks


def test_another_run_of_the_same_output_is_not_refused(
    toy_config: Callable[..., RunConfig], holder: subprocess.Popen[str]
) -> None:
    assert (run(toy_config("methods=[zero_shot]", "seeds=[1]"), console=quiet()) / "summary.csv").is_file()


def test_the_lock_of_a_killed_process_does_not_block(
    toy_config: Callable[..., RunConfig], tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / "out" / LOCKS / f"{NAME}.json").read_text())["pid"] == holder.pid
    run(toy_config("methods=[zero_shot]"), console=quiet())
    assert not (tmp_path / "out" / LOCKS / f"{NAME}.json").exists()


def test_results_of_other_settings_are_not_kept(toy_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = toy_config("methods=[zero_shot]")
    folder = run(config, console=quiet()) / "runs" / NAME
    result = json.loads((folder / "result.json").read_text())
    assert result["fingerprint"] == json.loads((folder / "config.json").read_text())["fingerprint"]
    other = toy_config("methods=[zero_shot]", "evaluation.max_new_tokens=4").replace(output=str(tmp_path / "other"))
    theirs = run(other, console=quiet()) / "runs" / NAME
    shutil.copy(theirs / "result.json", folder / "result.json")
    with pytest.raises(ConfigError, match=r"holds the results of a run with other settings; expected .*--fresh"):
        run(config, console=quiet())
    (folder / "result.json").write_text("{")
    with pytest.raises(ConfigError, match=r"result\.json is not JSON: it was truncated or edited.*--fresh"):
        run(config, console=quiet())
    (folder / "config.json").unlink()
    (folder / "result.json").write_text(json.dumps(result))
    with pytest.raises(ConfigError, match=r"config\.json is missing beside a result\. Restore it"):
        run(config, console=quiet())


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"summary": []}', '{"summary": {"seed": []}}', "[" * 10**5])
def test_a_damaged_result_of_another_run_is_named_and_stops_nothing(
    toy_config: Callable[..., RunConfig], tmp_path: Path, content: str
) -> None:
    damaged = tmp_path / "out" / "runs" / "other" / "result.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text(content)
    console = Console(file=io.StringIO(), width=10**4)
    output = run(toy_config("methods=[zero_shot]"), console=console)
    assert "out/runs/other/result.json cannot be read (" in console.file.getvalue()  # type: ignore[attr-defined]
    assert len((output / "summary.csv").read_text().splitlines()) == 2
