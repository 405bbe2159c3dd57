# SPDX-License-Identifier: Apache-2.0
"""scripts/sanitize.py, but for the build itself, which `make sanitize` does."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "sanitize.py"))


def test_every_test_it_runs_exists_and_no_compiled_op_is_left_out() -> None:
    folder = ROOT / "tests" / "kernels"
    assert all((folder / name).exists() for name in SCRIPT["TESTS"])
    assert {path.name for path in folder.glob("test_cpu_*.py")} <= set(SCRIPT["TESTS"])


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_compiler_without_sanitizers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "c++")
    with pytest.raises(
        ValueError, match="has no libnothing.so; expected GCC with its sanitizers. Set CXX to such a GCC"
    ):
        SCRIPT["runtime_library"]("libnothing.so")


def test_the_drawn_tests_ran_to_their_end_under_the_sanitizers() -> None:
    """`scripts/sanitize.py --draws N --record results/sanitized_draws.json`: hours, run by hand."""
    record = json.loads((ROOT / "results" / "sanitized_draws.json").read_text())
    assert record["failed"] == record["skipped"] == 0
    assert record["tests"] >= 6 and record["draws_per_test"] >= 2000
    assert record["sanitizers"] == ["address", "undefined"]
