# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.check_gpu`: its whole path in the interpreter, and that it fails when a kernel is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.check_gpu import command, correctness, roofline, sanitizer, timed_cases
from benchmarks.records import read_rows
from dmole_kernels import multi_lora as multi_lora_function
from dmole_kernels._multi_lora import FORWARD
from dmole_kernels._tune import INTERPRETER
from dmole_kernels.testing import triton_on_cpu

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_the_command_runs_without_a_gpu_and_says_so(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "", "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.check_gpu", "--output", str(tmp_path / "found")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(INTERPRETER)
    found = tmp_path / "found"
    assert {path.name for path in found.iterdir()} == {"summary.json", "benchmark.csv", "roofline.png", "tuned.json"}
    summary = json.loads((found / "summary.json").read_text())
    assert summary["device"] == INTERPRETER and summary["passed"] is True
    assert summary["correctness"]["checks"] > 30
    assert summary["correctness"]["wrong"] == {} and summary["correctness"]["left_out"] == []
    assert {tool["state"] for tool in summary["sanitizer"]["tools"]} == {"not run"}
    assert summary["benchmark"]["wrong"] == {}
    rows = read_rows(found / "benchmark.csv")
    assert {row["provider"] for row in rows} >= {*timed_cases.BASELINES, *timed_cases.OURS}
    assert all(row["machine"].startswith(INTERPRETER) for row in rows)
    assert (found / "roofline.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton forward with its output a hundredth too large."""
    right = FORWARD["triton"]

    def wrong(*arguments: Any) -> tuple[Tensor, Tensor]:
        y, shrunk = right(*arguments)
        return 1.01 * y, shrunk

    monkeypatch.setitem(FORWARD, "triton", wrong)


@pytest.fixture
def fewer_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One workload, which shows what many would."""
    every = correctness.checks

    def few(device: str, *, tiny: bool = False) -> list[correctness.Check]:
        chosen = "triton multi_lora token_gates float32"
        return [check for check in every(device, tiny=tiny) if check.name == chosen]

    monkeypatch.setattr(correctness, "checks", few)
    monkeypatch.setattr(command, "TUNED_KERNELS", ("shrink",))


@pytest.mark.slow
@pytest.mark.usefixtures("fewer_checks", "wrong_kernel")
def test_a_wrong_kernel_makes_it_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--output", str(tmp_path)]) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert not summary["passed"]
    (lines,) = summary["correctness"]["wrong"].values()
    assert "worst-row error" in lines[0]
    assert "triton" in summary["benchmark"]["wrong"]["tiny forward"]
    said = capsys.readouterr().out
    assert "WRONG triton multi_lora token_gates float32" in said and "FAILED" in said
    providers = {row["provider"] for row in read_rows(tmp_path / "benchmark.csv")}
    assert "triton" not in providers and "packed_eager" in providers


def test_a_check_that_breaks_off_is_a_finding_and_the_next_runs() -> None:
    def broken() -> list[str]:
        raise RuntimeError("an illegal memory access was encountered")

    checks = [correctness.Check(name="one", complaints=broken), correctness.Check(name="two", complaints=list)]
    part = command.check_correctness(iter(checks), 60.0, lambda *line: None)
    assert part["wrong"] == {"one": ["RuntimeError: an illegal memory access was encountered"]}
    assert part["checks"] == 2 and part["failed"]


def test_a_part_that_breaks_off_fails_the_run() -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError("no memory")

    assert "RuntimeError: no memory" in command._finished(broken)["error"]


def test_what_there_was_no_time_for_is_named() -> None:
    checks = [correctness.Check(name="late", complaints=list)]
    part = command.check_correctness(iter(checks), -1.0, lambda *line: None)
    assert part == {"failed": False, "checks": 0, "wrong": {}, "left_out": ["late"]}


@pytest.mark.parametrize("status, state", [(0, "clean"), (86, "wrong"), (1, "wrong")])
def test_the_sanitizer_s_answer_is_taken_from_its_exit_status(
    status: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program of that name on PATH stands for it: there is no GPU to run it on."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" >> {tmp_path}/calls\necho bad\nexit {status}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    verdicts = sanitizer.sanitize(60.0, gpu=True)
    assert [(v.tool, v.state) for v in verdicts] == [("memcheck", state), ("racecheck", state)]
    assert all(v.about == ("" if status == 0 else "bad") for v in verdicts)
    first, _ = (tmp_path / "calls").read_text().splitlines()
    assert first.startswith("1 --tool memcheck --error-exitcode 86 ")
    assert first.endswith("-m benchmarks.check_gpu.correctness")


def test_a_sanitizer_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert {v.about for v in sanitizer.sanitize(60.0, gpu=True)} == {
        "compute-sanitizer is not on PATH (it is part of the CUDA toolkit)"
    }
    assert {v.about for v in sanitizer.sanitize(60.0, gpu=False)} == {"no GPU"}


def test_the_matrix_covers_every_workload_in_every_dtype() -> None:
    names = [check.name for check in correctness.checks("cuda")]
    assert len(names) == len(set(names))
    for op in ("multi_lora", "multi_lora, constant gates", "fused_linear"):
        for dtype in ("float32", "float16", "bfloat16"):
            assert sum(name.startswith(f"triton {op} ") and name.endswith(dtype) for name in names) >= 18
    assert {"triton CUDA graph", "triton no host synchronisation", "triton torch.compile"} <= set(names)


def test_strides_and_seed_follow_the_inputs_to_the_device() -> None:
    workload = next(w for w in correctness.WORKLOADS if w.name == "strided_x")
    inputs = correctness.make_inputs(workload)
    there = correctness.on_device(inputs, "cpu")
    assert there.x.stride() == inputs.x.stride() and torch.equal(there.x, inputs.x)
    assert correctness.on_device(inputs, "meta").seed.device.type == "meta"


def test_the_published_roof_is_found_by_the_device_s_name() -> None:
    known = roofline.published("NVIDIA H100 80GB HBM3")
    assert known is not None and known[0] == "H100 SXM"
    assert roofline.published("NVIDIA GeForce RTX 4090") is None


def test_cases_on_a_gpu_have_every_baseline_and_the_decode_path_is_one() -> None:
    entries = timed_cases.entries(gpu=True)
    assert all(set(entry.providers) >= {*timed_cases.BASELINES, *timed_cases.OURS} for entry in entries)
    assert any(entry.case.rows == 16 for entry in entries)
    assert len({entry.case.name for entry in entries}) == len(entries)


def test_triton_serves_the_cpu_inside_the_block_only() -> None:
    x, one = torch.ones(1, 16), torch.ones(1, 1)
    call: Callable[[], Tensor] = lambda: multi_lora_function(  # noqa: E731
        x, None, [x], [x.t()], one, [1.0], backend="triton"
    )
    with triton_on_cpu():
        assert torch.equal(call(), torch.full((1, 16), 16.0))
    with pytest.raises(ValueError, match="backend='triton' got a tensor on 'cpu'; expected cuda"):
        call()
