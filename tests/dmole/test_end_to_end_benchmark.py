# SPDX-License-Identifier: Apache-2.0
"""mini_cmit.benchmarks.end_to_end on the toy stream: two sides in turns, every part of the work booked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from benchmarks.lora_providers import cpu_backends
from benchmarks.machine import Machine
from dmole.config import RunConfig
from dmole.data.sample import Stream
from dmole.models.vision_language import VisionLanguageModel
from mini_cmit.benchmarks.end_to_end import Side, play, rows_of, summary


@pytest.fixture
def machine() -> Machine:
    return Machine(name="a machine", versions="torch x", commit="0123456789ab")


def test_end_to_end_plays_both_sides_in_turns(
    toy_config: Callable[..., RunConfig], toy_stream: Stream, tiny_model: VisionLanguageModel, machine: Machine
) -> None:
    # The same backend twice: with one backend in the build there is no other to play against.
    names: Sequence[str] = (cpu_backends()[-1],) * 2
    sides = play(toy_config(), toy_stream, tiny_model, stages=2, steps=None, batches=1, backends=names, profiled=1)
    steps = len(sides[0].losses) - 1
    assert sides[0].losses == sides[1].losses and steps >= 3
    for side in sides:
        assert len(side.samples["step"]) == len(side.samples["backward"]) == steps
        assert len(side.samples["begin_stage"]) == len(side.samples["end_stage"]) == 2
        assert any(part.startswith("evaluation") for part in side.samples)
    rows = rows_of(sides, machine, case="toy", threads=1)
    assert {row.direction for row in rows} >= {"step", "forward", "backward", "optimizer"}
    assert any("of which proxy_seconds" in line for line in summary(sides))
    for side in sides:
        assert side.operators[0].endswith("operators by self time over 1 training steps")
        assert "ms a step" in side.operators[1]


def test_backends_that_disagree_are_not_timed(
    toy_config: Callable[..., RunConfig],
    toy_stream: Stream,
    tiny_model: VisionLanguageModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = Side.__post_init__
    made: list[Side] = []

    class Different(list):  # type: ignore[type-arg]
        """The losses of a backend that computes something else."""

        def append(self, loss: float) -> None:
            super().append(loss + 1.0)

    def unequal_losses(side: Side) -> None:
        original(side)
        made.append(side)
        if len(made) == 2:
            side.losses = Different()

    monkeypatch.setattr(Side, "__post_init__", unequal_losses)
    names = (cpu_backends()[-1],) * 2
    with pytest.raises(ValueError, match="expected agreement to 2%. Nothing is timed: run the op tests."):
        play(toy_config(), toy_stream, tiny_model, stages=1, steps=1, batches=0, backends=names)
