# SPDX-License-Identifier: Apache-2.0
"""The steps of a stage: the schedule by hand, the data order by name, and resuming in the middle bit for bit."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from dmole.config import LoraSettings, MethodSettings, TrainingSettings
from dmole.data.collate import collate
from dmole.data.sample import Stream
from dmole.methods import method_class
from dmole.methods.base import Method, answer_loss
from dmole.models.multimodal import MultimodalModel
from dmole.training import Profile, StageTraining, batch_indices, learning_rate_factor, stage_steps
from mini_cmit.model.tiny import build_tiny_model

SETTINGS = TrainingSettings(epochs=2, batch_size=4)


def begun(toy_stream: Stream, *, dropout: float = 0.2, begin: bool = True) -> Method:
    method = method_class("seq_ft")(build_tiny_model(0), MethodSettings(lora=LoraSettings(dropout=dropout)), seed=3)
    if begin:
        method.begin_stage(1, toy_stream.tasks[0])
    return method


def training(method: Method, toy_stream: Stream, settings: TrainingSettings = SETTINGS) -> StageTraining:
    return StageTraining(method, method.stages(toy_stream)[0], settings, seed=3, profile=Profile())


def test_schedule_by_hand() -> None:
    # 20 steps, 10 % warm-up: two rising steps, then a cosine over 18 that starts at 1.
    assert learning_rate_factor(0, 20, 0.1) == 0.5
    assert learning_rate_factor(1, 20, 0.1) == 1.0
    assert learning_rate_factor(2, 20, 0.1) == 1.0
    assert learning_rate_factor(11, 20, 0.1) == pytest.approx(0.5)
    assert learning_rate_factor(19, 20, 0.1) == pytest.approx(0.5 * (1 + math.cos(math.pi * 17 / 18)))
    assert learning_rate_factor(0, 5, 0.0) == 1.0
    assert learning_rate_factor(0, 1, 0.03) == 1.0


def test_batches_depend_on_seed_stage_and_epoch_alone() -> None:
    batches = batch_indices(10, 4, seed=1, stage=2, epoch=0)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(index for batch in batches for index in batch) == list(range(10))
    torch.manual_seed(99)
    assert batch_indices(10, 4, seed=1, stage=2, epoch=0) == batches
    others = [(2, 2, 0), (1, 3, 0), (1, 2, 1)]
    assert all(batch_indices(10, 4, seed=s, stage=t, epoch=e) != batches for s, t, e in others)


def test_epochs_of_single_tasks(toy_stream: Stream) -> None:
    stages = begun(toy_stream).stages(toy_stream)
    settings = TrainingSettings(epochs=2, epochs_of={"letters": 5}, batch_size=4)
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
    def with_idle(method: Method) -> StageTraining:
        running = training(method, toy_stream)
        running.parameters["idle"] = torch.nn.Parameter(torch.zeros(2))
        return running

    method = begun(toy_stream)
    running = with_idle(method)
    running.optimizer.add_param_group({"params": [running.parameters["idle"]]})
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
    running.run(lambda running: seen.append(method.mm.model.training))
    assert seen == [True] * running.total
    assert not any(module.training for module in method.mm.model.modules())


def test_only_the_adapter_moves_and_the_loss_falls(toy_stream: Stream) -> None:
    method = begun(toy_stream, dropout=0.0)
    names = set(method.trainable_parameters())
    before = {name: p.detach().clone() for name, p in method.mm.model.named_parameters()}
    running = training(method, toy_stream, TrainingSettings(epochs=8, batch_size=4, learning_rate=1e-2))
    running.run(lambda running: None)
    moved = {n for n, p in method.mm.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == names
    assert sum(running.losses[-3:]) < sum(running.losses[:3]) - 0.5
    assert set(running.profile.seconds) == {"data", "forward", "backward", "optimizer"}
    assert running.trainable_count == sum(before[name].numel() for name in names)


def test_loss_equals_cross_entropy_over_all_positions(toy_stream: Stream, tiny_model: MultimodalModel) -> None:
    samples = [sample for task in toy_stream.tasks for sample in task.train[:2]]
    batch = collate(tiny_model, samples, with_answers=True)
    whole = tiny_model.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, pixel_values=batch.pixel_values
    ).logits
    expected = torch.nn.functional.cross_entropy(
        whole[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(answer_loss(tiny_model.model, batch), expected)


def test_bf16_autocast_keeps_weights_and_loss_in_fp32(toy_stream: Stream) -> None:
    method = begun(toy_stream)
    running = training(method, toy_stream, dataclasses.replace(SETTINGS, epochs=1, bf16=True))
    running.run(lambda running: None)
    assert all(math.isfinite(loss) for loss in running.losses)
    assert all(p.dtype == torch.float32 for p in method.trainable_parameters().values())
    plain = training(begun(toy_stream), toy_stream, dataclasses.replace(SETTINGS, epochs=1))
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
        running.load_state({"rng": torch.get_rng_state(), "other/step": torch.zeros(())}, {"step": 0, "losses": []})
