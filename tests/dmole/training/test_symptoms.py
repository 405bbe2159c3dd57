# SPDX-License-Identifier: Apache-2.0
"""Warnings by hand, and those of a run that cannot learn."""

import io
import json
from collections.abc import Callable

import pytest
from rich.console import Console

from dmole.config import RunConfig, TrainingSettings
from dmole.runs.evaluation import Evaluation, Prediction
from dmole.runs.runner import run
from dmole.training.symptoms import below_zero_shot, flat_loss, malformed_answers

SETTINGS = TrainingSettings(learning_rate=0.002)


def test_a_flat_loss_is_named_with_its_numbers() -> None:
    assert flat_loss(2, "maps", [2.0] * 20 + [1.99] * 20, SETTINGS) == (
        "stage 2 (maps): the loss is flat, 2.000 in its first 4 steps and 1.990 in its last 4. Raise "
        "training.learning_rate (now 0.002) or the number of epochs, and check the answers in the training data."
    )


@pytest.mark.parametrize(
    ("losses", "why"),
    [
        ([2.0] * 20 + [1.95] * 20, "it fell by 2.5 %"),
        ([2.0] * 19, "too few steps to tell"),
        ([0.04] * 40, "there is nothing left to learn"),
    ],
)
def test_no_warning(losses: list[float], why: str) -> None:
    assert flat_loss(1, "maps", losses, SETTINGS) is None, why


def test_a_rising_loss_is_flat_too() -> None:
    assert flat_loss(1, "maps", [1.0] * 20 + [3.0] * 20, SETTINGS) is not None


def answers(task: str, *texts: str) -> tuple[Prediction, ...]:
    return tuple(Prediction(task=task, id=str(i), text=text, route=None, cut=False) for i, text in enumerate(texts))


def test_answers_without_form_are_shown() -> None:
    result = Evaluation(
        points={"a": 0.0, "b": 0.0, "c": 0.0},
        well_formed={"a": 0.0, "b": 0.5, "c": 0.0},
        cut={"a": 3, "b": 0, "c": 0},
        predictions=(*answers("a", "red red red", "blue"), *answers("b", "A"), *answers("c", "x")),
    )
    # Task c is not learned yet: its answers may have any form.
    assert malformed_answers(2, result, ["a", "b"]) == [
        "after stage 2, task a: 0 % of the answers are well-formed, for example 'red red red'. 3 of them are cut: "
        "raise evaluation.max_new_tokens. Compare it with the answers in the training data and with the task's metric."
    ]


def test_a_task_that_ends_below_the_pretrained_model() -> None:
    final, before = {"a": 2, "b": 2, "c": 2, "d": 2}, {"a": 50.0, "b": 50.0, "c": 50.0}
    found = below_zero_shot(before, final, {1: {"a": 0.0}, 2: {"a": 49.9, "b": 50.0, "d": 1.0}})
    assert len(found) == 1 and found[0].startswith("task a ends at 49.9 points, below the pretrained model's 50.0.")
    # Row 0 is the final row of a method without stages, and no row is below one that was not measured.
    assert below_zero_shot(before, dict.fromkeys(final, 0), {0: before}) == []
    assert below_zero_shot({}, final, {2: {"a": 0.0}}) == []


def test_a_run_that_cannot_learn_says_so_and_keeps_it(toy_config: Callable[..., RunConfig]) -> None:
    screen = io.StringIO()
    slow = ("methods=seq_ft", "training={learning_rate: 1.0e-9, num_train_epochs: 10, per_device_train_batch_size: 4}")
    output = run(toy_config(*slow), console=Console(file=screen, width=400))
    result = json.loads((output / "runs" / "seq_ft-seed0-default" / "result.json").read_text())
    shown = [line for line in screen.getvalue().splitlines() if line.startswith("warning: seq_ft-seed0-default: ")]
    assert sorted(line.removeprefix("warning: seq_ft-seed0-default: ") for line in shown) == sorted(result["warnings"])
    assert sum("the loss is flat" in line for line in shown) == 3
    assert any("after stage 3, task letters: 0 % of the answers are well-formed" in line for line in shown)
