# SPDX-License-Identifier: Apache-2.0
"""The estimate before the start: its sums by hand, its shortages, and that measuring changes nothing."""

import dataclasses
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dmole.config import RunConfig
from dmole.data.sample import Stream
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
