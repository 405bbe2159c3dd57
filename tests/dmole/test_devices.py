# SPDX-License-Identifier: Apache-2.0
"""No tensor is made without its input's device.

`torch.set_default_device("meta")` stands for a GPU where there is none: whatever forgets to say where a tensor goes
makes one without data, and the next operation beside a real one, or that reads a value, raises.
"""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from dmole.config import EvaluationSettings
from dmole.data.sample import Stream
from dmole.methods import method_class
from dmole.methods.dmole.settings import DMoLESettings, RouterSettings
from dmole.methods.settings import LoraSettings, MethodSettings
from dmole.profile import Profile
from dmole.runs.evaluation import evaluate, generation_queue
from dmole.training.settings import TrainingSettings
from dmole.training.stage_training import StageTraining
from mini_cmit.model.tiny import build_tiny_model

SETTINGS = TrainingSettings(
    num_train_epochs=1.0, per_device_train_batch_size=2, gradient_accumulation_steps=2, eval_strategy="epoch",
    load_best_model_at_end=True,
)  # fmt: skip


@pytest.fixture
def elsewhere() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    # Not the device from before: any device leaves a function mode on, which later tests would see.
    torch.set_default_device(None)


def test_the_fixture_catches_what_it_is_for(elsewhere: None) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        float((torch.ones(2, device="cpu") * torch.arange(2)).sum())


@pytest.mark.parametrize("method_name", ["dmole", "seq_ft"])
@pytest.mark.parametrize("way", ["fp32", "bf16", "checkpointing", "sketch"])
def test_a_run_makes_every_tensor_where_its_inputs_are(
    validated_stream: Stream, method_name: str, way: str, request: pytest.FixtureRequest
) -> None:
    settings = dataclasses.replace(
        SETTINGS,
        bf16=way == "bf16",
        activation_checkpointing=way == "checkpointing",
    )
    options = DMoLESettings(
        proxy_min_samples=4,
        proxy_method="sketch" if way == "sketch" else "exact",
        router=RouterSettings(epochs=2, margin=50.0),
    )
    model = build_tiny_model(0)
    lora = LoraSettings(rank=4, dropout=0.2)
    given = MethodSettings(lora=lora, options=options if method_name == "dmole" else None)
    method = method_class(method_name)(model, given, seed=3)
    request.getfixturevalue("elsewhere")
    queue = generation_queue(model, validated_stream.tasks, 4)
    for stage in method.stages(validated_stream)[:2]:
        method.begin_stage(stage.index, stage.task)
        running = StageTraining(method, stage, settings, seed=3, profile=Profile())
        running.run(lambda running: None)
        state = running.state()
        StageTraining(method, stage, settings, seed=3, profile=Profile()).load_state(*state)
        method.end_stage(stage.index, stage.task)
        tensors, meta = method.state()
        assert {tensor.device.type for tensor in (*tensors.values(), *state[0].values())} == {"cpu"}
        method.load_state(tensors, meta)
        row = evaluate(
            method,
            validated_stream.tasks,
            queue,
            EvaluationSettings(per_device_eval_batch_size=4, max_new_tokens=3),
            running.accelerator,
            profile=Profile(),
        )
        assert len(row.predictions) == 12
