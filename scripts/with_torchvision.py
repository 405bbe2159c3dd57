# SPDX-License-Identifier: Apache-2.0
"""`python scripts/with_torchvision.py [--record FILE]`: tests that need torchvision, in an environment of their own.

Processors with a video processor (Qwen-VL, InternVL, GLM-4V) need torchvision, and the index has CUDA builds of it,
which fail to import beside a CPU build of torch. So the set-up of constraints.txt, which has none, is installed once
more into build/torchvision, and beside it the torchvision of that release of torch, without its dependencies, which
would replace torch. tests/conftest.py makes that import work. `--record` writes which tests ran, and on what.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import venv
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "torchvision"
TESTS = ("tests/dmole/test_persons_day.py",)
SHOWN = ("torch", "torchvision", "transformers", "accelerate")


def torchvision_of(torch: str) -> str:
    """The requirement of the torchvision made for a release of torch: 2.13.0 and 0.28.*, 2.6.0 and 0.21.*."""
    major, minor = torch.split("+")[0].split(".")[:2]
    if major != "2":
        raise ValueError(f"torch: got {torch}; expected a release of 2. Say here which torchvision belongs to it.")
    return f"torchvision==0.{int(minor) + 15}.*"


def install(folder: Path) -> Path:
    """The Python of the environment, in which everything is installed."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    # A CUDA build of torch brings its own Triton, and these tests need none.
    pins = [line for line in lines if "==" in line and not line.startswith("triton==")]
    wanted = folder / "requirements.txt"
    wanted.write_text("\n".join(pins) + "\n", encoding="utf-8")
    (torch,) = (line.partition("==")[2] for line in pins if line.startswith("torch=="))
    pip = [str(python), "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "-r", str(wanted)], check=True)
    subprocess.run([*pip, "--no-deps", torchvision_of(torch)], check=True)
    return python


def run(python: Path, report: Path) -> int:
    command = [str(python), "-m", "pytest", "-m", "torchvision", f"--junitxml={report}", *TESTS]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def read_report(report: Path) -> dict[str, object]:
    """Counts of a junit report, and the names of the tests that ran to their end."""
    (suite,) = ElementTree.parse(report).getroot()
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    return {
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
        "tests": sorted(case.attrib["name"] for case in suite.iter("testcase") if len(case) == 0),
    }


def versions(python: Path) -> dict[str, str]:
    code = f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {SHOWN}}}))"
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout
    return {**json.loads(found), "python": platform.python_version()}


def commit() -> str:
    """The commit of this checkout, with "+" for local changes."""
    git = ("git", "-C", str(ROOT))
    head, changes = (
        subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout.strip()
        for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    )
    return head + "+" * bool(changes)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="write counts, commit, date and versions here")
    options = parser.parse_args(arguments)
    python, report = install(FOLDER), FOLDER / "report.xml"
    code = run(python, report)
    if options.record is not None and code == 0:
        found = {
            "command": "python scripts/with_torchvision.py",
            "what": "a person's day, and the contract, through processors with a video processor",
            **read_report(report),
            "commit": commit(),
            "date": datetime.date.today().isoformat(),
            "versions": versions(python),
        }
        options.record.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
