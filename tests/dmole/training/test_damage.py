# SPDX-License-Identifier: Apache-2.0
"""Damage that appears after a step's loss was read is found before anything of it is stored."""

import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dmole.config import RunConfig
from dmole.data.sample import Stream
from dmole.runs import checkpoint
from dmole.runs.runner import run
from dmole.training import stage_training
from dmole.training.damage import DamageError, check_unchanged, weight_sums
from dmole.training.settings import TrainingSettings
from dmole.training.stage_training import StageTraining
from mini_cmit.model.tiny import build_tiny_model
from tests.dmole.training.test_stage_training import begun, training

SETTINGS = TrainingSettings(num_train_epochs=1.0, per_device_train_batch_size=4)


def poison_after_the_last_step(running: StageTraining) -> None:
    """The optimizer's last step leaves a NaN in one weight: every loss has been finite."""

    def poison(optimizer: object, arguments: object, keywords: object) -> None:
        if running.step == running.total - 1:
            with torch.no_grad():
                next(iter(running.parameters.values()))[0, 0] = float("nan")

    running.optimizer.optimizer.register_step_post_hook(poison)


def test_a_weight_that_the_last_step_damages_is_named(toy_stream: Stream) -> None:
    running = training(begun(toy_stream), toy_stream, SETTINGS)
    poison_after_the_last_step(running)
    expected = (
        r"lora_a has 1 of \d+ values that are not finite at step 3 of 3 of stage 1 \(colours\); expected finite "
        r"numbers\. Lower training\.learning_rate \(now .*\) in a run of its own\. The last checkpoint is from before"
    )
    with pytest.raises(DamageError, match=expected):
        running.run(lambda running: None)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_gradients_that_are_not_finite_change_no_weight(toy_stream: Stream, max_grad_norm: float) -> None:
    method = begun(toy_stream)
    running = training(method, toy_stream, dataclasses.replace(SETTINGS, max_grad_norm=max_grad_norm))
    before = {name: p.detach().clone() for name, p in running.parameters.items()}
    parameter = next(p for name, p in running.parameters.items() if ".fc1." in name)
    parameter.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), float("inf")))
    with pytest.raises(DamageError, match=r"the norm of the gradients is (inf|nan) at step 1 of 3 of stage 1"):
        running.run(lambda running: None)
    assert all(torch.equal(before[name], p) for name, p in running.parameters.items())


def test_logits_that_are_not_finite_are_named(toy_stream: Stream) -> None:
    method = begun(toy_stream)
    running = training(method, toy_stream, SETTINGS)
    running.run(lambda running: None)
    running.check_logits()
    with torch.no_grad():
        method.vlm.model.get_output_embeddings().weight[-1] = float("nan")
    with pytest.raises(DamageError, match=r"the logits has \d+ of \d+ values .* at step 3 of 3 of stage 1 \(colours\)"):
        running.check_logits()


def test_every_changed_weight_of_the_base_is_named() -> None:
    model = build_tiny_model(0).model
    sums = weight_sums(model)
    check_unchanged(model, sums, "at the end of stage 1")
    assert set(sums) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1].add_(1e-3)
        with pytest.raises(DamageError, match=rf"{name} of the base model has changed at the end of stage 1; expected"):
            check_unchanged(model, sums, "at the end of stage 1")
        with torch.no_grad():
            parameter.copy_(kept)
    check_unchanged(model, sums, "at the end of stage 1")


@pytest.fixture
def second_stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[StageTraining], None]]]:
    """What is called with the training of stage 2 before its first step."""
    actions: list[Callable[[StageTraining], None]] = []
    original = StageTraining.run

    def patched(self: StageTraining, after_step: Callable[[StageTraining], None]) -> None:
        if self.stage.index == 2:
            for action in actions:
                action(self)
        original(self, after_step)

    monkeypatch.setattr(stage_training.StageTraining, "run", patched)
    yield actions


def files(folder: Path) -> dict[str, bytes]:
    names = ("matrix.csv", "predictions.jsonl.gz", "losses.csv")
    return {f"{run.name}/{name}": (run / name).read_bytes() for run in folder.glob("runs/*") for name in names}


def damage_base(running: StageTraining) -> None:
    base = next(p for name, p in running.method.vlm.model.named_parameters() if name.endswith("fc1.base.weight"))
    kept = base.detach().clone()

    def write(optimizer: object, arguments: object, keywords: object) -> None:
        with torch.no_grad():
            base[0, 0] = kept[0, 0] + 1.0

    running.optimizer.optimizer.register_step_post_hook(write)


@pytest.mark.parametrize("damage", [poison_after_the_last_step, damage_base])
def test_a_damaged_expert_is_stored_nowhere_and_the_last_good_checkpoint_goes_on(
    toy_config: Callable[..., RunConfig],
    tmp_path: Path,
    second_stage: list[Callable[[StageTraining], None]],
    damage: Callable[[StageTraining], None],
) -> None:
    config = toy_config("methods=[dmole]", "training.save_strategy=steps", "training.save_steps=1")
    second_stage.append(damage)
    with pytest.raises(DamageError, match=r"stage 2"):
        run(config, console=Console(file=io.StringIO()))
    folder = tmp_path / "out" / "runs" / "dmole-seed0-default"
    assert not (folder / "result.json").exists()
    newest = checkpoint.latest(folder / "checkpoints")
    assert newest is not None
    loaded = checkpoint.load(newest)
    assert loaded.documents["position"]["phase"] == "train" and loaded.documents["position"]["stage"] == 1
    assert all(bool(torch.isfinite(t.float()).all()) for t in loaded.tensors["method"].values())
    second_stage.clear()
    run(config, console=Console(file=io.StringIO()))
    resumed = files(tmp_path / "out")
    run(config.replace(output=str(tmp_path / "whole")), console=Console(file=io.StringIO()))
    assert resumed == files(tmp_path / "whole")
