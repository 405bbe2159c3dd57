# SPDX-License-Identifier: Apache-2.0
"""Zero-shot, Finetune, Joint and Seq-FT: stages, equal parameters, when the adapter starts afresh."""

import pytest
import torch
from torch import Tensor

from dmole.data.collate import collate
from dmole.data.sample import Stream
from dmole.methods import Method, method_class, method_names
from dmole.methods._single_adapter import ADAPTER, SingleAdapter, parity_rank
from dmole.methods.dmole.settings import DMoLESettings
from dmole.methods.seq_ft import SeqFtOptions
from dmole.methods.settings import MethodSettings
from mini_cmit.model.tiny import build_tiny_model

SIZES = {"vision": {"v.0.q": 20, "v.1.q": 20}, "language": {"l.0.q": 40, "l.1.q": 40}}


def built(name: str, **options: object) -> Method:
    settings = MethodSettings(options=SeqFtOptions(**options)) if options else MethodSettings()  # type: ignore[arg-type]
    return method_class(name)(build_tiny_model(0), settings, seed=0)


def logits(method: Method, stream: Stream, *, training: bool = False) -> Tensor:
    batch = collate(method.vlm, stream.tasks[0].train[:2], with_answers=training)
    gates = method.training_gates(batch) if training else method.evaluation_gates(batch)
    with torch.no_grad(), gates:
        out: Tensor = method.vlm.model(
            **batch.encoded.inputs,
        ).logits
    return out


def disturb(method: Method) -> None:
    with torch.no_grad():
        for parameter in method.trainable_parameters().values():
            parameter.add_(0.05)


def test_registry() -> None:
    assert set(method_names()) >= {"zero_shot", "finetune", "joint", "seq_ft", "dmole"}
    assert all(method_class(name).name == name for name in method_names())
    with pytest.raises(ValueError, match=r"method is 'base'; expected one of dmole, finetune"):
        method_class("base")


def test_stages(toy_stream: Stream) -> None:
    every = toy_stream.task_names
    seq = built("seq_ft").stages(toy_stream)
    assert [(s.index, s.row, s.task.name, s.evaluates) for s in seq] == [
        (k, k, name, every) for k, name in enumerate(every, start=1)
    ]
    fine = built("finetune").stages(toy_stream)
    assert [(s.row, s.evaluates) for s in fine] == [(k, (name,)) for k, name in enumerate(every, start=1)]
    (joint,) = built("joint").stages(toy_stream)
    assert (joint.index, joint.row, joint.evaluates) == (1, 3, every)
    assert len(joint.task.train) == sum(len(task.train) for task in toy_stream.tasks)
    assert built("zero_shot").stages(toy_stream) == []


def test_equal_parameters_by_hand() -> None:
    # Half of the linears at rank 8: 8 * 0.5 * (40 + 80) = 480 weights; rank 4 on all of them is 4 * 120 = 480.
    assert parity_rank(8, DMoLESettings(), SIZES) == 4
    assert parity_rank(8, DMoLESettings(budget_fraction=1.0), SIZES) == 8
    # One tower only: half of the language linears is 8 * 40 = 320 weights; rank 3 on all is 360, rank 2 is 240.
    assert parity_rank(8, DMoLESettings(towers="language"), SIZES) == 3
    assert parity_rank(1, DMoLESettings(budget_fraction=0.25), SIZES) == 1


def test_the_scale_does_not_change_with_the_rank() -> None:
    method = built("seq_ft")
    assert isinstance(method, SingleAdapter)
    assert method.rank == 4
    assert method.alpha / method.rank == 16.0 / 8


def test_a_fresh_adapter_is_the_base_model_and_serves_every_sample_once_trained(toy_stream: Stream) -> None:
    base = logits(built("zero_shot"), toy_stream)
    method = built("seq_ft")
    method.begin_stage(1, toy_stream.tasks[0])
    torch.testing.assert_close(logits(method, toy_stream), base)
    disturb(method)
    changed = logits(method, toy_stream)
    assert ((changed - base).abs().amax(dim=(1, 2)) > 1e-3).all()
    torch.testing.assert_close(logits(method, toy_stream, training=True).shape[:1], changed.shape[:1])


@pytest.mark.parametrize(
    ("name", "options", "kept"),
    [("seq_ft", {}, True), ("seq_ft", {"mode": "merge_and_restart"}, True), ("finetune", {}, False)],
    ids=["continue", "merge", "finetune"],
)
def test_what_the_second_stage_starts_from(
    name: str, options: dict[str, object], kept: bool, toy_stream: Stream
) -> None:
    method = built(name, **options)
    base = logits(built("zero_shot"), toy_stream)
    method.begin_stage(1, toy_stream.tasks[0])
    disturb(method)
    trained = logits(method, toy_stream)
    method.end_stage(1, toy_stream.tasks[0])
    torch.testing.assert_close(logits(method, toy_stream), trained, atol=1e-4, rtol=1e-4)
    method.begin_stage(2, toy_stream.tasks[1])
    start = logits(method, toy_stream)
    torch.testing.assert_close(start, trained if kept else base, atol=1e-4, rtol=1e-4)
    fresh = all(not p.any() for n, p in method.trainable_parameters().items() if n.endswith("lora_b"))
    assert fresh == (options.get("mode") == "merge_and_restart" or name == "finetune")


@pytest.mark.parametrize("mode", ["continue", "merge_and_restart"])
def test_state_comes_back_in_a_new_object(mode: str, toy_stream: Stream) -> None:
    method = built("seq_ft", mode=mode)
    for stage in (1, 2):
        method.begin_stage(stage, toy_stream.tasks[stage - 1])
        disturb(method)
        if stage == 1:
            method.end_stage(stage, toy_stream.tasks[0])
    other = built("seq_ft", mode=mode)
    other.load_state(*method.state())
    assert torch.equal(logits(other, toy_stream), logits(method, toy_stream))
    assert other.trainable_parameters().keys() == method.trainable_parameters().keys()
    assert all(ADAPTER in name for name in other.trainable_parameters())


def test_zero_shot_trains_nothing(toy_stream: Stream) -> None:
    method = built("zero_shot")
    assert method.trainable_parameters() == {}
    assert method.state() == ({}, {})
    method.load_state({}, {})
    with pytest.raises(ValueError, match=r"zero_shot got a state with \['x'\]; expected none"):
        method.load_state({}, {"x": 1})
    with pytest.raises(ValueError, match=r"zero_shot was asked to train stage 1 \(colours\)"):
        method.begin_stage(1, toy_stream.tasks[0])


def test_timed_work_adds_up() -> None:
    method = built("zero_shot")
    with method.profile.part("proxy_seconds"):
        pass
    once = method.timings()["proxy_seconds"]
    with method.profile.part("proxy_seconds"):
        pass
    assert method.timings()["proxy_seconds"] > once > 0
