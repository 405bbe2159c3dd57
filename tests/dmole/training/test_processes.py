# SPDX-License-Identifier: Apache-2.0
"""Two gloo processes under torchrun compute what one does: gradients, losses, proxy, features, answers, files."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dmole.config_error import ConfigError
from dmole.reports.verify import verify_results
from dmole.training.processes import gathered, is_sharded, process, shard, shared
from mini_cmit.model.tiny import build_tiny_model

SCRIPT = Path(__file__).with_name("training_processes.py")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("training_processes", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def results(validated_folder: Path, output: Path) -> list[dict[str, Any]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(SCRIPT)]
    done = subprocess.run(
        [*command, str(validated_folder), str(output)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    found = []
    for rank in range(2):
        found.append(torch.load(output / f"results_{rank}.pt", weights_only=False))
    assert all(result["processes"] == 2 and result["device"].startswith("cpu") for result in found)
    return found


REDUCED_HERE = ("seq_ft_sharded", "dmole_sharded", "dmole_reentrant")
WAYS = ("seq_ft", "dmole", "dmole_accumulated", "dmole_checkpointing", *REDUCED_HERE)


@pytest.fixture(scope="module")
def alone(validated_folder: Path, script: ModuleType) -> dict[str, Any]:
    return {name: script.numbers(validated_folder, name) for name in ("seq_ft", "dmole")}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_first_gradients_and_twenty_losses_are_those_of_one_process(
    results: list[dict[str, Any]], alone: dict[str, Any], way: str
) -> None:
    expected = alone["dmole" if way.startswith("dmole") else "seq_ft"]
    truth = torch.cat([gradient.flatten() for gradient in expected["gradients"]])
    assert float(truth.norm()) > 0
    for result in results:
        gradients = torch.cat([gradient.flatten() for gradient in result[way]["gradients"]])
        assert float((gradients - truth).norm() / truth.norm()) <= 1e-6
        assert len(result[way]["losses"]) == 20
        assert result[way]["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        assert [step for step, _ in result[way]["validation"]] == [7, 14, 20]
        losses = [loss for _, loss in result[way]["validation"]]
        assert losses == pytest.approx([loss for _, loss in expected["validation"]], rel=1e-4)
    # Both processes hold the same weights: the sum of the gradients is the same to the bit.
    assert results[0][way]["losses"] == results[1][way]["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_proxy_scores_are_those_of_all_batches(results: list[dict[str, Any]], alone: dict[str, Any], way: str) -> None:
    expected = alone["seq_ft"]["scores"]
    for result in results:
        torch.testing.assert_close(result[way]["scores"], expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(results[0][way]["scores"], results[1][way]["scores"])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["dmole", "dmole_sharded"])
def test_router_features_are_gathered(results: list[dict[str, Any]], alone: dict[str, Any], way: str) -> None:
    for result in results:
        assert torch.equal(result[way]["features"], alone["dmole"]["features"])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["seq_ft_sharded", "seq_ft"])
def test_an_evaluation_is_split_and_gathered(results: list[dict[str, Any]], alone: dict[str, Any], way: str) -> None:
    """The weights of the second stage's start are drawn, so every process has those of one process."""
    expected = alone["seq_ft"]["row"]
    for result in results:
        found = result[way]["row"]
        assert found.points == expected.points
        assert found.predictions == expected.predictions


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_ddp_reduces_gradients_wherever_it_can(results: list[dict[str, Any]], way: str) -> None:
    expected = "StageLoss" if way in REDUCED_HERE else "DistributedDataParallel"
    assert [result[way]["loss"] for result in results] == [expected] * 2


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_stage_leaves_no_wrapper_behind(results: list[dict[str, Any]], way: str) -> None:
    """The wrapper itself, a wrapped `forward` of the model, accelerate's mark that would leave autocast out."""
    assert [result[way]["left"] for result in results] == [[False] * 3] * 2


@pytest.mark.slow
def test_ddp_takes_what_a_reentrant_checkpoint_uses_for_unused(results: list[dict[str, Any]]) -> None:
    """Why gradients are reduced without DistributedDataParallel there."""
    for result in results:
        assert "Expected to mark a variable ready only once" in result["reentrant_under_ddp"]


@pytest.mark.slow
def test_beside_a_sharded_base_ddp_s_collectives_come_in_another_order_on_each_process(
    results: list[dict[str, Any]],
) -> None:
    """Why gradients are reduced after backward there: experts that a process does not use are reduced early."""
    reduced = ["reduce expert 1", "reduce expert 0"]
    gathered = ["gather layer 1", "gather layer 0"]
    orders = [result["order"] for result in results]
    for order in orders:
        assert [event for event in order if event in reduced] == reduced
        assert [event for event in order if event in gathered] == gathered
    assert orders[0] != orders[1]


@pytest.mark.slow
def test_a_sharded_base_is_sharded_again_after_a_forward(results: list[dict[str, Any]]) -> None:
    """Every layer is a root, whose weights FSDP2 would keep until a backward that an evaluation never has."""
    assert all(result["resharded"] for result in results)


@pytest.mark.slow
def test_torchrun_runs_the_command_line(toy_folder: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "dmole"]
    command += ["run", str(toy_folder), "--model", "tiny", "--method", "seq_ft", "--output", str(tmp_path / "out")]
    for setting in ("training.num_train_epochs=1", "training.per_device_train_batch_size=2", "lora.rank=4"):
        command += ["--set", setting]
    command += ["--set", "evaluation.max_new_tokens=3", "--set", "training.bf16=true"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("results: ") == 1
    assert verify_results(tmp_path / "out").ok


@pytest.mark.slow
def test_a_run_is_written_once_and_resumes_to_the_same_files(results: list[dict[str, Any]], output: Path) -> None:
    assert all(result["stops"] >= 3 for result in results)
    names = ("matrix.csv", "predictions.jsonl.gz", "references.jsonl.gz", "losses.csv")
    folders = ("dmole-seed0-default", "seq_ft-seed0-default")
    for folder in folders:
        for name in names:
            one, two = (output / kind / "runs" / folder / name for kind in ("calm", "disturbed"))
            assert one.read_bytes() == two.read_bytes()
    assert not list(output.rglob("*.partial")) and not list(output.rglob("checkpoints"))


@pytest.mark.slow
def test_a_checkpoint_of_another_number_of_processes_is_refused(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert "was written by 1 processes; got 2. Start as many." in result["other_count"]


def test_one_process_does_everything_itself() -> None:
    assert process() == (0, 1)
    assert shared(3, lambda place: place * place) == [0, 1, 4]
    assert gathered(["a"]) == ["a"]
    model = build_tiny_model(0).model
    with pytest.raises(ConfigError, match=r"training.fsdp is True in one process; expected several. Launch with torch"):
        shard(model, "cpu")
    assert not is_sharded(model)
