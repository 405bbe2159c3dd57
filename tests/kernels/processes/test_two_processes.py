# SPDX-License-Identifier: Apache-2.0
"""DDP and FSDP2 on two gloo processes: gradients of the experts equal those of one process with all samples."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dmole_kernels import load_experts

from . import two_processes

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two_processes")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, str(Path(two_processes.__file__)), str(rank), str(folder)], cwd=ROOT, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in running:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]
    found = [torch.load(folder / f"results_{rank}.pt") for rank in range(2)]
    return [result | {"folder": folder} for result in found]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "sharded"])
@pytest.mark.parametrize("kind", list(two_processes.GATES))
def test_gradients_equal_those_of_one_process(results: list[dict[str, Any]], way: str, kind: str) -> None:
    expected = two_processes.one_process(kind)
    assert any(bool(gradient.any()) for gradient in expected)
    for result in results:
        for found, truth in zip(result[f"{way}_{kind}"], expected, strict=True):
            torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_sharded_experts_are_refused(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert "expert 'a' is sharded (a DTensor); expected plain parameters" in result["refused"]
        assert "ignored_params=set(experts.parameters())" in result["refused"]


@pytest.mark.slow
def test_experts_beside_a_sharded_base_are_saved_as_stock_folders(results: list[dict[str, Any]]) -> None:
    base = two_processes.model()
    experts = two_processes.with_experts(base)
    kept = [p.detach().clone() for p in experts.parameters()]
    for parameter in experts.parameters():
        torch.nn.init.zeros_(parameter)
    load_experts(experts, results[0]["folder"] / "experts")
    assert all(torch.equal(p, before) for p, before in zip(experts.parameters(), kept, strict=True))


@pytest.mark.slow
def test_without_the_refusal_sharded_experts_would_get_each_other_s_gradients(results: list[dict[str, Any]]) -> None:
    expected = two_processes.one_process("different")
    off = max(float((g - e).abs().max()) for g, e in zip(results[0]["unchecked"], expected, strict=True))
    assert off > 0.1
