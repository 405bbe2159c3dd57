# SPDX-License-Identifier: Apache-2.0
"""The steps of a stage: the schedule by hand, the data order by name, and resuming in the middle bit for bit."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from dmole.config_error import ConfigError
from dmole.data.collate import collate
from dmole.data.sample import Stream
from dmole.methods import method_class
from dmole.methods.base import Method, answer_loss
from dmole.methods.settings import LoraSettings, MethodSettings
from dmole.models.vision_language import VisionLanguageModel
from dmole.profile import Profile
from dmole.training.optimization import make_optimizer, make_schedule
from dmole.training.settings import TrainingSettings
from dmole.training.stage_training import StageTraining, stage_steps
from mini_cmit.model.tiny import build_tiny_model

SETTINGS = TrainingSettings(num_train_epochs=2.0, per_device_train_batch_size=4)


def begun(toy_stream: Stream, *, dropout: float = 0.2, begin: bool = True) -> Method:
    method = method_class("seq_ft")(build_tiny_model(0), MethodSettings(lora=LoraSettings(dropout=dropout)), seed=3)
    if begin:
        method.begin_stage(1, toy_stream.tasks[0])
    return method


def training(method: Method, toy_stream: Stream, settings: TrainingSettings = SETTINGS) -> StageTraining:
    return StageTraining(method, method.stages(toy_stream)[0], settings, seed=3, profile=Profile())


def test_schedule_by_hand() -> None:
    # 20 steps, 10 % warm-up: transformers' cosine starts at 0, reaches the peak at step 2 and ends just above 0.
    settings = TrainingSettings(learning_rate=1.0, warmup_steps=0.1)
    optimizer = make_optimizer(settings, {"w": torch.nn.Parameter(torch.zeros(1))})
    schedule = make_schedule(settings, optimizer, 20)
    rates = []
    for _ in range(20):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:3] == [0.0, 0.5, 1.0]
    assert rates[11] == pytest.approx(0.5)
    assert rates[19] == pytest.approx(0.5 * (1 + math.cos(math.pi * 17 / 18)))


def test_arguments_that_a_schedule_does_not_take_are_refused() -> None:
    settings = TrainingSettings(lr_scheduler_kwargs={"power": 2.0})
    optimizer = make_optimizer(settings, {"w": torch.nn.Parameter(torch.zeros(1))})
    with pytest.raises(
        ConfigError, match=r"lr_scheduler_kwargs is \{'power': 2.0\}; expected the arguments of the sched"
    ):
        make_schedule(settings, optimizer, 20)
    settings = dataclasses.replace(settings, lr_scheduler_type="polynomial")
    assert make_schedule(settings, optimizer, 20).get_last_lr() == [0.0]


def test_epochs_of_single_tasks(toy_stream: Stream) -> None:
    stages = begun(toy_stream).stages(toy_stream)
    settings = TrainingSettings(num_train_epochs=2.0, epochs_of={"letters": 5.0}, per_device_train_batch_size=4)
    assert [stage_steps(settings, stage) for stage in stages] == [2 * 3, 5 * 3, 2 * 3]


def test_resuming_inside_a_stage_gives_the_same_bits(toy_stream: Stream) -> None:
    method = begun(toy_stream)
    whole = training(method, toy_stream)
    kept: dict[str, tuple[dict[str, Tensor], dict[str, object]]] = {}

    def keep(running: StageTraining) -> None:
        if running.step == 4:  # inside the second epoch
            for name, part in (("method", method.state()), ("training", running.state())):
                kept[name] = ({key: value.clone() for key, value in part[0].items()}, {**part[1]})
            kept["training"][1]["losses"] = list(running.losses)

    whole.run(keep)
    assert (whole.step, whole.total, len(whole.losses)) == (6, 6, 6)
    resumed_method = begun(toy_stream, begin=False)
    resumed_method.load_state(*kept["method"])
    resumed = training(resumed_method, toy_stream)
    torch.manual_seed(12345)
    resumed.load_state(*kept["training"])
    resumed.run(lambda running: None)
    assert resumed.losses == whole.losses
    expected, _ = method.state()
    got, _ = resumed_method.state()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_parameter_without_gradients_does_not_hinder_resuming(toy_stream: Stream) -> None:
    idle = torch.nn.Parameter(torch.zeros(2))

    def with_idle(method: Method) -> StageTraining:
        trained = type(method).trainable_parameters(method)
        method.trainable_parameters = lambda: {**trained, "idle": idle}  # type: ignore[method-assign]
        return training(method, toy_stream)

    method = begun(toy_stream)
    running = with_idle(method)
    running.run(lambda running: None)
    tensors, meta = running.state()
    assert not any(name.startswith("idle/") for name in tensors)
    resumed = with_idle(method)
    resumed.load_state(tensors, meta)
    assert len(resumed.optimizer.state) == len(running.parameters) - 1
    del tensors[f"{next(iter(running.parameters))}/exp_avg"]
    with pytest.raises(ValueError, match=r"lacks \['.*/exp_avg'\]"):
        with_idle(method).load_state(tensors, meta)


def test_dropout_is_on_in_training_only(toy_stream: Stream) -> None:
    method = begun(toy_stream, dropout=0.5)
    with torch.no_grad():
        for parameter in method.trainable_parameters().values():
            parameter.normal_()
    running = training(method, toy_stream)
    seen: list[bool] = []
    running.run(lambda running: seen.append(method.vlm.model.training))
    assert seen == [True] * running.total
    assert not any(module.training for module in method.vlm.model.modules())


def test_only_the_adapter_moves_and_the_loss_falls(toy_stream: Stream) -> None:
    method = begun(toy_stream, dropout=0.0)
    names = set(method.trainable_parameters())
    before = {name: p.detach().clone() for name, p in method.vlm.model.named_parameters()}
    running = training(
        method, toy_stream, TrainingSettings(num_train_epochs=8.0, per_device_train_batch_size=4, learning_rate=1e-2)
    )
    running.run(lambda running: None)
    moved = {n for n, p in method.vlm.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == names
    assert sum(running.losses[-3:]) < sum(running.losses[:3]) - 0.5
    assert set(running.profile.seconds) == {"data", "forward", "backward", "optimizer"}
    assert running.trainable_count == sum(before[name].numel() for name in names)


def test_loss_equals_cross_entropy_over_all_positions(toy_stream: Stream, tiny_model: VisionLanguageModel) -> None:
    samples = [sample for task in toy_stream.tasks for sample in task.train[:2]]
    batch = collate(tiny_model, samples, with_answers=True)
    whole = tiny_model.model(
        **batch.encoded.inputs,
    ).logits
    expected = torch.nn.functional.cross_entropy(
        whole[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(answer_loss(tiny_model, batch), expected)


def test_bf16_autocast_keeps_weights_and_loss_in_fp32(toy_stream: Stream) -> None:
    method = begun(toy_stream)
    running = training(method, toy_stream, dataclasses.replace(SETTINGS, num_train_epochs=1.0, bf16=True))
    running.run(lambda running: None)
    assert all(math.isfinite(loss) for loss in running.losses)
    assert all(p.dtype == torch.float32 for p in method.trainable_parameters().values())
    plain = training(begun(toy_stream), toy_stream, dataclasses.replace(SETTINGS, num_train_epochs=1.0))
    plain.run(lambda running: None)
    assert running.losses[0] != plain.losses[0]
    assert running.losses[0] == pytest.approx(plain.losses[0], rel=0.02)


def test_a_loss_that_is_not_finite_stops_the_run(toy_stream: Stream) -> None:
    method = begun(toy_stream)
    with torch.no_grad():
        # Not of a query or key: attention over scores that are all NaN gives zeros.
        parameters = method.trainable_parameters()
        next(p for name, p in parameters.items() if ".fc1." in name).fill_(float("nan"))
    with pytest.raises(
        ValueError, match=r"the loss is nan at step 1 of 6 of stage 1 \(colours\).*Lower training.learn"
    ):
        training(method, toy_stream).run(lambda running: None)


def test_parameters_that_cannot_be_trained_are_refused(toy_stream: Stream) -> None:
    with pytest.raises(ValueError, match=r"seq_ft trains no parameter in stage 1 \(colours\)"):
        training(begun(toy_stream, begin=False), toy_stream)
    method = begun(toy_stream)
    next(iter(method.trainable_parameters().values())).requires_grad_(False)
    with pytest.raises(ValueError, match=r"requires_grad=False; expected a float32 parameter"):
        training(method, toy_stream)


def test_state_of_other_parameters_is_refused(toy_stream: Stream) -> None:
    running = training(begun(toy_stream), toy_stream)
    with pytest.raises(ValueError, match=r"the optimizer state has \['other/step'\] and lacks"):
        running.load_state({"rng": torch.get_rng_state()[None], "other/step": torch.zeros(())}, running.state()[1])
