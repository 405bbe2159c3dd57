# SPDX-License-Identifier: Apache-2.0
"""scripts/with_torchvision.py, but for the installation, and its committed record: every such test ran and passed."""

from __future__ import annotations

import ast
import json
import runpy
from pathlib import Path

import pytest

from tests.dmole.test_persons_day import VIDEO

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "with_torchvision.py"))


def marked(path: Path) -> list[str]:
    """The test functions of a file that are marked `torchvision`."""
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    return [f.name for f in functions if any(ast.unparse(d) == "pytest.mark.torchvision" for d in f.decorator_list)]


def test_every_test_that_needs_torchvision_ran_and_passed() -> None:
    """By name: a test that is added or renamed needs a new record."""
    record = json.loads((ROOT / "results" / "torchvision_tests.json").read_text())
    names = [name for path in SCRIPT["TESTS"] for name in marked(ROOT / path)]
    assert len(names) >= 2
    assert record["tests"] == sorted(f"{name}[{family}]" for name in names for family in VIDEO)
    assert record["failed"] == record["skipped"] == 0 and record["passed"] == len(record["tests"])
    assert len(record["commit"]) == 12 and "+" not in record["commit"]
    assert set(record["versions"]) == {"torch", "torchvision", "transformers", "accelerate", "python"}


def test_no_other_file_has_tests_that_need_torchvision() -> None:
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.torchvision" in path.read_text()]
    named = {ROOT / path for path in SCRIPT["TESTS"]}
    assert set(files) - {Path(__file__).resolve()} == named


@pytest.mark.parametrize(
    ("torch", "expected"), [("2.13.0", "torchvision==0.28.*"), ("2.6.0+cpu", "torchvision==0.21.*")]
)
def test_every_release_of_torch_has_its_torchvision(torch: str, expected: str) -> None:
    assert SCRIPT["torchvision_of"](torch) == expected


def test_an_unknown_release_of_torch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch: got 3.0.0; expected a release of 2"):
        SCRIPT["torchvision_of"]("3.0.0")


def test_skipped_and_failed_tests_are_counted_and_not_named(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite tests="4" failures="1" errors="1" skipped="1"><testcase name="a"/>'
        '<testcase name="b"><failure/></testcase><testcase name="c"><skipped/></testcase>'
        '<testcase name="d"><error/></testcase></testsuite></testsuites>'
    )
    assert SCRIPT["read_report"](report) == {"passed": 1, "failed": 2, "skipped": 1, "tests": ["a"]}
