# SPDX-License-Identifier: Apache-2.0
"""The estimate before the start: its sums by hand, its shortages, and that measuring changes nothing."""

import dataclasses
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dmole.config import RunConfig
from dmole.data.collate import collate
from dmole.data.sample import Stream
from dmole.methods import method_class
from dmole.methods.base import OwnWork
from dmole.models.identity import tensors_digest
from dmole.models.vision_language import VisionLanguageModel
from dmole.runs.estimate import EXPERTS, GIB, Estimate, Rates, estimate, measure, trained_weights
from dmole.runs.plan import check_plan, plan_runs
from dmole.runs.runner import run

RATES = Rates(trained_sample=0.5, answer=0.25, peak_bytes=2.0 * GIB, device="cpu")


def estimated(config: RunConfig, stream: Stream, model: VisionLanguageModel) -> Estimate:
    plans = plan_runs(config, stream, model)
    stages = {plan.folder: check_plan(plan, config, model) for plan in plans}
    return estimate(plans, stages, config, model, RATES)


def test_the_sums_by_hand(
    toy_config: Callable[..., RunConfig], toy_stream: Stream, tiny_model: VisionLanguageModel
) -> None:
    config = toy_config("methods=[seq_ft, finetune]", "training={num_train_epochs: 2, per_device_train_batch_size: 4}")
    got = estimated(config, toy_stream, tiny_model)
    # Three tasks of 10 training samples: 3 steps an epoch. Row 0 once, then 12 answers a row and 4.
    assert got.steps == 2 * 3 * 2 * 3
    assert got.answers == 12 + 3 * 12 + 3 * 4
    assert got.seconds == pytest.approx(36 * 4 * 0.5 * EXPERTS + 60 * 0.25)
    trained = trained_weights("seq_ft", config, tiny_model)
    sizes = [tiny_model.model.get_submodule(name) for names in tiny_model.candidates.values() for name in names]
    assert trained == 4 * sum(layer.in_features + layer.out_features for layer in sizes) // 2  # type: ignore
    weights = sum(p.numel() * p.element_size() for p in tiny_model.model.state_dict().values())
    assert got.memory_bytes == 2 * GIB + weights + 16 * trained
    assert got.disk_bytes == 2 * trained * (3 * 4 + 8) + 200 * 60


def test_a_part_of_the_matrix_costs_less(
    toy_config: Callable[..., RunConfig], toy_stream: Stream, tiny_model: VisionLanguageModel
) -> None:
    answers = {
        mode: estimated(toy_config("methods=seq_ft", f"evaluation.stages={mode}"), toy_stream, tiny_model).answers
        for mode in ("all", "diagonal", "last")
    }
    assert answers == {"all": 12 + 36, "diagonal": 12 + 12, "last": 12 + 12}
    without = toy_config("methods=seq_ft", "evaluation={stages: last, zero_shot: false}")
    assert estimated(without, toy_stream, tiny_model).answers == 12


SAMPLED = "dmole={proxy_min_samples: 4, proxy_batch_size: 4, router: {epochs: 2, feature_batch_size: 4}}"


@pytest.mark.parametrize("router", [[], ["dmole.routing=none", "dmole.training_neighbour=none"]], ids=["routed", "not"])
def test_a_method_s_own_passes_are_those_that_it_makes(
    router: list[str],
    toy_config: Callable[..., RunConfig],
    toy_stream: Stream,
    tiny_model: VisionLanguageModel,
) -> None:
    """Counted on a real run over the stages: samples through the language tower, outside steps and answers."""
    config = toy_config("methods=dmole", SAMPLED, *router)
    settings = config.method_settings("dmole")
    method = method_class("dmole")(tiny_model, settings, seed=0)
    stages = method.stages(toy_stream)
    work = method_class("dmole").own_work(settings, stages, toy_stream, linears(tiny_model, method.candidates))
    forward = backward = 0

    def count(module: object, inputs: object, keywords: dict[str, Any], output: Any) -> None:
        nonlocal forward, backward
        ids = keywords.get("inputs_embeds", keywords.get("input_ids"))
        forward += len(ids)
        backward += len(ids) * torch.is_grad_enabled()

    tower = tiny_model.model.get_submodule(tiny_model.towers["language"])
    handle = tower.register_forward_hook(count, with_kwargs=True)
    for stage in stages:
        method.begin_stage(stage.index, stage.task)
        method.end_stage(stage.index, stage.task)
        for task in toy_stream.tasks:
            batch = collate(tiny_model, task.test, with_answers=False)
            with method.evaluation_gates(batch):
                pass
    handle.remove()
    assert (work.forward, work.backward) == (forward, backward)
    assert backward == 3 * 4


def linears(model: VisionLanguageModel, candidates: dict[str, tuple[str, ...]]) -> dict[str, dict[str, Any]]:
    return {tower: {name: model.model.get_submodule(name) for name in own} for tower, own in candidates.items()}


def test_the_own_passes_of_each_method_by_hand(
    toy_config: Callable[..., RunConfig], toy_stream: Stream, tiny_model: VisionLanguageModel
) -> None:
    plain = estimated(toy_config("methods=seq_ft"), toy_stream, tiny_model)
    config = toy_config("methods=dmole", SAMPLED)
    got = estimated(config, toy_stream, tiny_model)
    # Proxy: 4 samples a stage, forward and twice that backward. Features: 10 training samples a stage, 12 test samples.
    assert got.steps == plain.steps and got.answers == plain.answers
    assert got.seconds - plain.seconds == pytest.approx((12 * 1.5 + (30 + 12) * 0.5) * 0.5)
    layers = linears(tiny_model, tiny_model.candidates)
    settings = config.method_settings("dmole")
    own = method_class("dmole").own_work(settings, [], toy_stream, layers).memory_bytes
    weights = sum(layer.weight.numel() for tower in layers.values() for layer in tower.values())
    assert own == 4 * weights
    sketched = toy_config("methods=dmole", "dmole.proxy_method=sketch").method_settings("dmole")
    count = sum(len(tower) for tower in layers.values())
    assert method_class("dmole").own_work(sketched, [], toy_stream, layers).memory_bytes == 4 * 64 * 64 * count
    assert method_class("seq_ft").own_work(settings, [], toy_stream, layers) == OwnWork()


def test_what_there_is_too_little_of_is_named(tmp_path: Path) -> None:
    small = Estimate(seconds=4000.0, steps=1200, answers=30, memory_bytes=GIB / 8, disk_bytes=GIB / 64, device="cpu")
    assert str(small) == (
        "estimate: 1:06:40 on cpu for 1,200 training steps and 30 answers, 0.1 GiB of memory, 0.02 GiB on disk"
    )
    assert small.shortages(tmp_path / "not" / "there") == []
    free = shutil.disk_usage(tmp_path).free
    large = dataclasses.replace(small, memory_bytes=1e6 * GIB, disk_bytes=2.0 * free)
    memory, disk = large.shortages(tmp_path / "not" / "there")
    assert "the runs need about 1000000.0 GiB. Lower training.per_device_train_batch_size and " in memory
    assert disk.startswith(f"disk: {tmp_path} has ") and disk.endswith("Choose another --output or make room.")


def test_measuring_changes_nothing(
    toy_config: Callable[..., RunConfig], toy_stream: Stream, tiny_model: VisionLanguageModel
) -> None:
    digest, state = tensors_digest(tiny_model.model), torch.get_rng_state()
    rates = measure(tiny_model, toy_stream, toy_config())
    assert rates.trained_sample > 0 and rates.answer > 0 and rates.peak_bytes > 0
    assert rates.costs.measured and rates.costs.trained_sample == pytest.approx(rates.trained_sample * EXPERTS)
    assert tensors_digest(tiny_model.model) == digest and torch.equal(torch.get_rng_state(), state)
    assert not tiny_model.model.training
    assert all(p.grad is None and not p.requires_grad for p in tiny_model.model.parameters())
    assert not tiny_model.model.get_input_embeddings()(torch.tensor([[1]])).requires_grad


def test_it_is_printed_before_the_first_run_and_not_when_nothing_is_left(toy_config: Callable[..., RunConfig]) -> None:
    config = toy_config("methods=zero_shot")
    first, second = io.StringIO(), io.StringIO()
    run(config, console=Console(file=first, width=400))
    assert first.getvalue().splitlines()[-1].startswith("estimate: 0:0")
    assert "for 0 training steps and 12 answers" in first.getvalue()
    run(config, console=Console(file=second, width=400))
    assert "estimate" not in second.getvalue()
