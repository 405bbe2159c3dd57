# SPDX-License-Identifier: Apache-2.0
"""DDP and FSDP2 on two gloo processes against one process with the same global batch."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.slow

WORKER = Path(__file__).parent / "two_processes.py"
WAYS = ("ddp", "ddp_checkpointed", "fsdp", "fsdp_checkpointed", "replicated")
SHARDED = (
    r"^experts: got 'a', whose parameters are sharded \(DTensor\); expected plain tensors on every process: .* "
    r"Pass fully_shard\(\.\.\., ignored_params=set\(experts\.parameters\(\)\)\)"
)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process saw. They meet in a file, so no port is chosen."""
    folder = tmp_path_factory.mktemp("two")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(folder / "store"), str(folder)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """One process, the whole batch, no torch.distributed."""
    worker = runpy.run_path(str(WORKER))
    seen = {}
    for kind, gate in worker["GATES"].items():
        model, experts = worker["build"]()
        seen[kind] = worker["steps"](model, experts, gate, slice(0, worker["SAMPLES"]))
    return seen


def distance(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize("kind", ["same", "different"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_equal_one_process(
    seen: list[dict[str, Any]], alone: dict[str, dict[str, Any]], way: str, kind: str
) -> None:
    """Where ranks use the same experts, and where each uses another one; `c` is used by none."""
    expected = alone[kind]
    for rank in range(2):
        got = seen[rank][f"{way}-{kind}"]
        assert got["gradients"].keys() == expected["gradients"].keys()
        for key, gradient in expected["gradients"].items():
            if ".c." in key:
                assert gradient is None and got["gradients"][key] is None
            else:
                assert gradient.norm() > 1e-4
                assert distance(got["gradients"][key], gradient) < 1e-6
        for key, value in expected["experts"].items():
            assert distance(got["experts"][key], value) < 1e-6
            assert torch.equal(got["experts"][key], seen[0][f"{way}-{kind}"]["experts"][key])


def test_the_two_kinds_of_batches_have_different_gradients(alone: dict[str, dict[str, Any]]) -> None:
    same, different = alone["same"]["gradients"], alone["different"]["gradients"]
    assert all(distance(same[key], different[key]) > 1e-2 for key in same if ".c." not in key)


@pytest.mark.parametrize("with_ddp", [False, True], ids=["replicated", "ddp"])
def test_accumulated_gradients_are_reduced_once(
    seen: list[dict[str, Any]], alone: dict[str, dict[str, Any]], with_ddp: bool
) -> None:
    for rank in range(2):
        for key, gradient in alone["different"]["gradients"].items():
            got = seen[rank][f"accumulated-{with_ddp}"]["gradients"][key]
            assert got is None if gradient is None else distance(got, gradient) < 1e-6


def test_a_gradient_that_one_process_lacks_counts_as_zero(seen: list[dict[str, Any]]) -> None:
    for rank in range(2):
        assert seen[rank]["reduced"] == {"mean": [0.25, 25.0, None], "sum": [0.5, 50.0, None]}
        assert seen[rank]["other"] == "reduction: got 'max'; expected 'mean' or 'sum'. Choose one of them."


@pytest.mark.parametrize("place", ["use", "use_after_forward", "explicit", "reduce", "partly"])
def test_sharded_experts_are_refused(seen: list[dict[str, Any]], place: str) -> None:
    """When a block is opened (also while FSDP2 shows plain tensors), with an explicit gate, when only B is sharded."""
    for rank in range(2):
        assert re.match(SHARDED, seen[rank]["sharded_experts"][place])


def test_what_sharded_experts_would_get(seen: list[dict[str, Any]]) -> None:
    """Gradients 1 on process 0 and 100 on process 1, of different experts: 0.5 and 50 are right. This is why."""
    assert [seen[rank]["sharded_experts"]["silent"] for rank in range(2)] == [[50.5], [50.5]]


@pytest.mark.parametrize("what", ["in_place", "loaded"])
def test_experts_of_a_sharded_base_are_saved_and_loaded_in_place(seen: list[dict[str, Any]], what: str) -> None:
    assert all(seen[rank]["files"][what] for rank in range(2))


def test_experts_added_to_a_sharded_base_are_plain_tensors_where_it_is(seen: list[dict[str, Any]]) -> None:
    for rank in range(2):
        assert seen[rank]["files"]["added"] == {(nn.Parameter, "cpu", torch.float32)}
        assert torch.equal(seen[rank]["files"]["gradients"], seen[0]["files"]["gradients"])
        assert len(seen[rank]["files"]["gradients"]) == 16 and (seen[rank]["files"]["gradients"] > 0).sum() == 12


@pytest.mark.parametrize("what", ["keys", "state", "set"])
def test_the_state_of_a_sharded_model_has_the_names_and_values_of_the_whole_one(
    seen: list[dict[str, Any]], what: str
) -> None:
    """get_model_state_dict and set_model_state_dict of torch.distributed.checkpoint."""
    assert seen[0]["files"][what] is True


def test_processes_whose_experts_differ_are_refused(seen: list[dict[str, Any]]) -> None:
    for rank in range(2):
        mistakes = seen[rank]["mistakes"]
        assert mistakes["equal"] == "no error"
        assert mistakes["seeds"].startswith("reduce_gradients: the experts have other values on another process;")
        assert "generator=torch.Generator().manual_seed(0)" in mistakes["seeds"]
        assert mistakes["frozen"].startswith("reduce_gradients: the processes have different trainable experts")


def test_reduce_gradients_needs_a_process_group() -> None:
    from dmole_kernels import convert

    experts = convert(nn.Sequential(nn.Linear(4, 4)))
    experts.add("a", rank=2)
    with pytest.raises(
        ValueError, match=r"no process group is initialised; .* Call torch\.distributed\.init_process_group first"
    ):
        experts.reduce_gradients()
