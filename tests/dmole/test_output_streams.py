# SPDX-License-Identifier: Apache-2.0
"""What a terminal or a pipe cannot take ends no command with a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("arguments", [["config"], ["verify", "results/mini"], ["report", "results/mini"]])
def test_a_reader_that_goes_away_ends_a_command_quietly(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # before the command writes its first byte, as `| head -0` may
    command = [sys.executable, "-m", "dmole", *arguments]
    with subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        os.close(writing)
        _, errors = process.communicate(timeout=120)
    assert errors == "" and process.returncode in (1, 141)


@pytest.mark.parametrize(
    "environment", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"}]
)
def test_characters_that_the_encoding_lacks_are_escaped(environment: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "r\u00e9sultats"
    command = [sys.executable, "-m", "dmole", "verify", str(run)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, check=False, timeout=120
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "sultats has no finished run" in done.stderr
    shown = [sys.executable, "-m", "dmole", "report", "results/mini"]
    done = subprocess.run(
        shown, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, check=False, timeout=120
    )
    assert done.returncode == 0 and done.stderr == "" and "dmole" in done.stdout
