# SPDX-License-Identifier: Apache-2.0
"""What somebody adds, by doing it: a package with entry points, and one new file for a method and one for a metric."""

from __future__ import annotations

import csv
import filecmp
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMMANDS = """
import json, sys
from dmole.cli import status
for command in json.loads(sys.argv[1]):
    assert status(command) == 0, command
"""


def dmole(commands: Sequence[Sequence[str]], path: Sequence[Path], folder: Path) -> str:
    """What a new process prints that runs these command lines with `path` in front of everything."""
    environment: Mapping[str, str] = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT))),
        "DMOLE_CACHE": str(folder / "cache"),
        "COLUMNS": "200",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMMANDS, json.dumps(commands)],
        env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(file: Path) -> dict[str, dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return {row["method"]: row for row in csv.DictReader(lines)}


@pytest.mark.slow
def test_a_package_of_somebody_else_adds_a_method_a_metric_a_stream_and_a_recipe(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(HERE / "foreign_package", source, ignore=shutil.ignore_patterns("__pycache__"))
    site, output = tmp_path / "site", tmp_path / "out"
    install = ["install", "-q", "--no-index", "--no-deps", "--no-build-isolation", "--target", str(site), str(source)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, timeout=300)
    said = dmole(
        [
            ["run", "--recipe", "shades_quickly", "-o", str(output)],
            ["verify", str(output)],
            ["config", "--recipe", "shades_quickly"],
            ["inspect", "tiny"],
        ],
        [site],
        tmp_path,
    )
    assert "drawing shades in" in said and "verified 2 runs, " in said
    assert "  # Which linears carry the adapter: 1 is all of them. [integer]\n  n: 3\n" in said
    config = json.loads((output / "runs" / "every_nth-seed0-default" / "config.json").read_text())
    assert config["config"]["stream"] == "shades" and config["identity"]["options"] == {"n": 3}
    environment = json.loads((output / "runs" / "every_nth-seed0-default" / "environment.json").read_text())
    assert environment["packages"]["somebody"] == "1.2"
    found = rows(output / "summary.csv")
    # 12 linears of one tower and 14 of the other: every third of each. The budget is the same for both.
    assert found["every_nth"]["linears"] == "9" and found["seq_ft"]["linears"] == ""
    trained = {name: int(row["trainable_parameters"]) for name, row in found.items()}
    assert 0.7 < trained["every_nth"] / trained["seq_ft"] < 1.3
    # The tables divide step times by the one of the method that says it is the baseline.
    assert "step / seq_ft's" in said


METHOD = '''# SPDX-License-Identifier: Apache-2.0
"""Echo: the pretrained model under another name."""

from dataclasses import dataclass
from typing import Any, ClassVar

from dmole.methods.base import Pretrained


@dataclass(frozen=True, kw_only=True)
class EchoOptions:
    """Echo: says nothing new."""

    # How often.
    times: int = 1


class Echo(Pretrained):
    """The pretrained model under another name."""

    name: ClassVar[str] = "echo"
    Options: ClassVar[type[Any]] = EchoOptions
'''
METRIC = '''# SPDX-License-Identifier: Apache-2.0
"""Half a point for every answer."""

from typing import ClassVar

from dmole.metrics.base import Metric


class Half(Metric):
    """0.5 for every sample."""

    name: ClassVar[str] = "half"

    def score_samples(self, predictions, samples):
        return [0.5] * len(samples)

    def well_formed(self, prediction, sample):
        return True

    def check(self, sample, *, test):
        return []
'''


def new_files(copy: Path, original: Path) -> list[str]:
    """The files of `copy` that are not those of `original`; asserts that all others are the same."""
    compared = filecmp.dircmp(copy, original, ignore=["__pycache__"])
    assert compared.right_only == compared.diff_files == compared.funny_files == []
    below = [f"{name}/{file}" for name in compared.common_dirs for file in new_files(copy / name, original / name)]
    return sorted([*compared.left_only, *below])


@pytest.mark.slow
def test_a_new_method_touches_one_file_and_a_new_metric_one(tmp_path: Path, toy_folder: Path) -> None:
    house = tmp_path / "house"
    shutil.copytree(ROOT / "dmole", house / "dmole", ignore=shutil.ignore_patterns("__pycache__"))
    (house / "dmole" / "methods" / "echo.py").write_text(METHOD)
    (house / "dmole" / "metrics" / "half.py").write_text(METRIC)
    stream = shutil.copytree(toy_folder, tmp_path / "stream")
    (stream / "stream.yaml").write_text((stream / "stream.yaml").read_text().replace("exact_match", "half"))
    output = tmp_path / "out"
    said = dmole(
        [
            ["tasks", "check", str(stream)],
            ["run", str(stream), "--model", "tiny", "--method", "echo", "--set", "echo.times=2", "--set",
             "evaluation.max_new_tokens=3", "-o", str(output)],
            ["verify", str(output)],
            ["config", "--set", "echo.times=3"],
            ["inspect", "tiny"],
        ],
        [house],
        tmp_path,
    )  # fmt: skip
    assert "colours: half, 10 train, 0 validation, 4 test" in said and "verified 1 runs, " in said
    assert "  # How often. [integer]\n  times: 3\n" in said and said.rpartition("Methods")[2].count(" echo ") == 1
    matrix = (output / "runs" / "echo-seed0-default" / "matrix.csv").read_text().splitlines()
    assert matrix[1].startswith("0,50.0,")
    assert new_files(house / "dmole", ROOT / "dmole") == ["methods/echo.py", "metrics/half.py"]
