# SPDX-License-Identifier: Apache-2.0
"""float16 with a gradient scaler. accelerate has it on GPUs alone, and torch has both on a CPU: the accelerator gets
here what its GPU branch would give it, and the loop runs as it would there."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from dmole.data.sample import Stream
from dmole.training import stage_training
from dmole.training.settings import TrainingSettings
from dmole.training.stage_training import Profile, StageTraining
from tests.dmole.training.test_training_traps import SETTINGS, begun, trained, weights

HALF = dataclasses.replace(SETTINGS, fp16=True)


def scaling(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """Accelerators of the loop train in float16 with a scaler that starts at `scale`."""

    def make(settings: TrainingSettings) -> Accelerator:
        accelerator = plain(dataclasses.replace(settings, fp16=False))
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return accelerator

    plain = stage_training.make_accelerator
    monkeypatch.setattr(stage_training, "make_accelerator", make)


def seen_by_the_optimizer(running: StageTraining) -> list[dict[str, Tensor]]:
    """The gradients of each step, filled as they come."""
    kept: list[dict[str, Tensor]] = []

    def keep(optimizer: object, arguments: object, keywords: object) -> None:
        kept.append({n: p.grad.clone() for n, p in running.parameters.items() if p.grad is not None})

    running.optimizer.optimizer.register_step_pre_hook(keep)
    return kept


@pytest.mark.parametrize("batches", [1, 2])
def test_float16_trains_as_float32_does(toy_stream: Stream, monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """Gradients are unscaled before they are clipped and used, whatever the scale and the number of batches."""
    settings = dataclasses.replace(
        HALF, per_device_train_batch_size=4 // batches, gradient_accumulation_steps=batches, max_grad_norm=1e-3
    )
    expected = trained(toy_stream, dataclasses.replace(settings, fp16=False))[1]
    scaling(monkeypatch, 2.0**10)
    method = begun(toy_stream)
    running = StageTraining(method, method.stages(toy_stream)[0], settings, seed=3, profile=Profile())
    dtypes = set()
    layer = next(iter(method.layers.values()))  # type: ignore[attr-defined]
    handle = layer.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    gradients = seen_by_the_optimizer(running)
    running.run(lambda running: None)
    handle.remove()
    assert dtypes == {torch.float16}
    assert running.losses == pytest.approx(expected.losses, rel=0.02)
    assert running.losses != expected.losses
    for step in gradients:
        assert float(torch.stack([g.norm() for g in step.values()]).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_a_step_whose_gradients_overflow_is_left_out(toy_stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling(monkeypatch, 2.0**60)
    method = begun(toy_stream)
    before = weights(method)
    running = StageTraining(method, method.stages(toy_stream)[0], HALF, seed=3, profile=Profile())
    running.run(lambda running: None)
    assert running.step == running.total == 3 and len(running.losses) == 3
    assert running.accelerator.scaler.get_scale() == 2.0**57
    assert all(torch.equal(value, before[name]) for name, value in weights(method).items())


def test_the_scale_is_part_of_a_checkpoint(toy_stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overflow in the first step, then a checkpoint: the resumed stage goes on with the halved scale."""
    scaling(monkeypatch, 2.0**60)
    method = begun(toy_stream)
    running = StageTraining(method, method.stages(toy_stream)[0], HALF, seed=3, profile=Profile())

    class Stop(Exception):
        pass

    def stop(running: StageTraining) -> None:
        raise Stop

    with pytest.raises(Stop):
        running.run(stop)
    tensors, meta = running.state()
    resumed = StageTraining(method, method.stages(toy_stream)[0], HALF, seed=3, profile=Profile())
    assert resumed.accelerator.scaler.get_scale() == 2.0**60
    resumed.load_state({name: tensor.clone() for name, tensor in tensors.items()}, meta)
    assert resumed.accelerator.scaler.get_scale() == 2.0**59
