# SPDX-License-Identifier: Apache-2.0
"""Trackers: what is logged and when, TensorBoard by default, and an error for one that is not installed."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import GeneralTracker, get_available_trackers
from rich.console import Console

from dmole.config import RunConfig
from dmole.config_error import ConfigError
from dmole.data.sample import Stream
from dmole.methods import method_class
from dmole.methods.settings import LoraSettings, MethodSettings
from dmole.profile import Profile
from dmole.runs.runner import run
from dmole.training.acceleration import make_accelerator, tracking
from dmole.training.settings import TrainingSettings
from dmole.training.stage_training import StageTraining
from mini_cmit.model.tiny import build_tiny_model

INSTALLED = {str(name) for name in get_available_trackers()}


class Lines(GeneralTracker):
    """accelerate's own interface, into a file."""

    name = "lines"
    requires_logging_directory = False

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.finished = False

    @property
    def tracker(self) -> Path:
        return self.path

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.path.write_text(json.dumps({"config": values}) + "\n")

    def log(self, values: dict[str, Any], step: int | None, **keywords: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def finish(self) -> None:
        self.finished = True


def test_losses_rates_and_validation_reach_the_trackers(validated_stream: Stream, tmp_path: Path) -> None:
    settings = TrainingSettings(
        num_train_epochs=2.0, per_device_train_batch_size=4, logging_steps=2, eval_strategy="epoch", warmup_steps=2
    )
    method = method_class("seq_ft")(build_tiny_model(0), MethodSettings(lora=LoraSettings(rank=4)), seed=3)
    method.begin_stage(1, validated_stream.tasks[0])
    tracker = Lines(tmp_path / "lines")
    accelerator = make_accelerator(settings, trackers=[tracker])
    with tracking(accelerator, "run", {"seed": 3, "training": {"bf16": False, "epochs_of": {}}, "tasks": ["a"]}):
        running = StageTraining(
            method, method.stages(validated_stream)[0], settings, seed=3, profile=Profile(), log=accelerator.log,
            first_step=100,
        )  # fmt: skip
        running.run(lambda running: None)
    assert tracker.finished
    first, *lines = [json.loads(line) for line in tracker.path.read_text().splitlines()]
    assert first["config"] == {"seed": 3, "training.bf16": False, "tasks": "['a']"}
    trained = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in trained] == [102, 104, 106]
    assert [line["train/loss"] for line in trained] == [
        math.fsum(running.losses[at : at + 2]) / 2 for at in range(0, 6, 2)
    ]
    # The rate of the step itself: the second warm-up step of two has half of the peak, then the cosine falls.
    assert [line["train/learning_rate"] for line in trained] == pytest.approx(
        [0.5e-3, 1e-3 * 0.5 * (1 + math.cos(math.pi / 4)), 1e-3 * 0.5 * (1 + math.cos(3 * math.pi / 4))]
    )
    assert all(line["train/grad_norm"] > 0 and line["train/stage"] == 1 for line in trained)
    validated = [(line["step"] - 100, line["eval/loss"]) for line in lines if "eval/loss" in line]
    assert validated == running.validation.history and [step for step, _ in validated] == [3, 6]


@pytest.mark.skipif("wandb" in INSTALLED, reason="wandb is installed")
def test_a_tracker_that_is_not_installed_is_refused(toy_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"training.report_to has 'wandb', which is not installed; expected one of"):
        run(toy_config("methods=seq_ft", "training.report_to=wandb"), console=Console(file=io.StringIO()))


def test_nothing_is_written_where_no_tracker_is_asked_for(toy_config: Callable[..., RunConfig]) -> None:
    output = run(
        toy_config("methods=seq_ft", "training.report_to=none", "train_samples=4"), console=Console(file=io.StringIO())
    )
    assert not list(output.rglob("logs"))


def test_the_default_is_tensorboard_where_it_is_installed(toy_config: Callable[..., RunConfig]) -> None:
    output = run(
        toy_config("methods=seq_ft", "train_samples=4", "training.logging_steps=1"),
        console=Console(file=io.StringIO()),
    )
    events = list(output.rglob("events.out.tfevents.*"))
    assert bool(events) == ("tensorboard" in INSTALLED)
    if events:
        reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        # The tracker keeps the settings in a folder of its own.
        folder = output / "runs" / "seq_ft-seed0-default" / "logs" / "seq_ft-seed0-default"
        found = reading.EventAccumulator(str(folder))
        found.Reload()
        assert [event.step for event in found.Scalars("train/loss")] == [1, 2, 3]
