# SPDX-License-Identifier: Apache-2.0
"""scripts/quietly.py: a compiler's output is in a file, and on the terminal only where it failed."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WALL = "import sys; [print(f'line {i}', file=sys.stderr if i % 2 else sys.stdout, flush=True) for i in range(100)]"


def quietly(tmp_path: Path, *command: str, show: str = "", trouble: str = "") -> subprocess.CompletedProcess[str]:
    log = tmp_path / "build" / "log.txt"
    words = [sys.executable, str(ROOT / "scripts" / "quietly.py"), "--log", str(log), "--what", "compiled things"]
    return subprocess.run(
        [*words, "--show", show, "--trouble", trouble, "--", *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )


def test_a_command_that_succeeds_is_two_lines(tmp_path: Path) -> None:
    done = quietly(tmp_path, sys.executable, "-c", WALL)
    log = tmp_path / "build" / "log.txt"
    assert done.returncode == 0 and done.stderr == ""
    first, last = done.stdout.splitlines()
    assert first == f"compiled things: started, output in {log}"
    assert re.fullmatch(r"compiled things: done in \d+:\d\d", last)
    assert log.read_text().splitlines() == [f"line {i}" for i in range(100)]


def test_lines_that_a_reader_needs_are_shown(tmp_path: Path) -> None:
    done = quietly(tmp_path, sys.executable, "-c", WALL + "; print('note: no compiler')", show="note: ")
    _, note, last = done.stdout.splitlines()
    assert note == "note: no compiler" and last.startswith("compiled things: done in ")


def test_a_command_that_fails_shows_the_end_of_its_output(tmp_path: Path) -> None:
    done = quietly(tmp_path, sys.executable, "-c", WALL + "; sys.exit(3)")
    assert done.returncode == 3
    said = done.stderr.splitlines()
    assert said[0].startswith("compiled things: failed with status 3: ")
    assert said[1] == f"the last 30 of 100 lines of {tmp_path / 'build' / 'log.txt'}:"
    assert said[2:] == [f"line {i}" for i in range(70, 100)]


def test_a_failure_that_the_command_goes_on_without_is_shown(tmp_path: Path) -> None:
    text = "note: built without it (the compiler failed)"
    done = quietly(
        tmp_path, sys.executable, "-c", WALL + f"; print({text!r})", show="note: ", trouble="compiler failed"
    )
    assert done.returncode == 0 and done.stdout.splitlines()[1:] == [text]
    said = done.stderr.splitlines()
    assert said[0].startswith("compiled things: trouble: ")
    assert said[2:] == [*(f"line {i}" for i in range(71, 100)), text]


def test_a_command_that_does_not_exist_fails_too(tmp_path: Path) -> None:
    done = quietly(tmp_path, "no-such-compiler", "-O3")
    assert done.returncode == 127
    assert "no-such-compiler: No such file or directory" in done.stderr


def test_make_compiles_through_it() -> None:
    setup = (ROOT / "Makefile").read_text()
    (line,) = [line for line in setup.splitlines() if "scripts/quietly.py" in line]
    assert "--log build/kernels.log" in line
    after = setup[setup.index(line) :].splitlines()[1]
    assert '--show "dmole_kernels: " --trouble "the compiler failed" -- $(BIN)/python setup.py' in after
    assert "(the compiler failed: " in (ROOT / "setup.py").read_text()
    assert setup.count("setup.py -q build_ext") == setup.count("build_ext") == 1
