# SPDX-License-Identifier: Apache-2.0
"""scripts/fuzz_records.py: its committed record, a short run of it, and that it would notice."""

import importlib.util
import json
import os
import time
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_records", ROOT / "scripts" / "fuzz_records.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = _script()


def test_damaged_records_and_settings_ended_as_read_or_as_named_findings() -> None:
    record = json.loads((ROOT / "results" / "fuzz_records.json").read_text())
    assert record["number"] >= 800 and record["wrong"] == [] and len(record["commit"]) == 12
    named = {"records": "finding", "configurations": "ConfigError", "settings": "ConfigError"}
    assert set(record["outcomes"]) == set(named) == set(SCRIPT.KINDS)
    for kind, counts in record["outcomes"].items():
        assert sum(counts.values()) == record["number"] and set(counts) == {"read", named[kind]}
        # Both kinds of outcome are common, or the draws would say little.
        assert min(counts.values()) > record["number"] // 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("stream")
    SCRIPT.make_stream(made)
    return made


@pytest.mark.parametrize("kind", SCRIPT.KINDS)
@given(number=st.integers(0, 10**9))
@settings(
    max_examples=int(os.environ.get("DMOLE_DRAWS", "150")), deadline=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
def test_a_drawn_one_ends_as_read_or_as_a_named_finding(kind: str, number: int, folder: Path) -> None:
    assert SCRIPT.outcome(kind, number, 0, folder) in ("read", "finding", "ConfigError")


def _raises(*_: object) -> None:
    raise RecursionError("too deep")


def _hangs(*_: object) -> None:
    time.sleep(30)


@pytest.mark.parametrize(("fault", "expected"), [(_raises, "wrong: RecursionError"), (_hangs, "wrong: TimeoutError")])
def test_what_must_not_be_is_noticed(
    fault: object, expected: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(SCRIPT, "SECONDS", 1)
    monkeypatch.setitem(SCRIPT.KINDS, "records", fault)
    assert SCRIPT.outcome("records", 0, 0, folder).startswith(expected)
