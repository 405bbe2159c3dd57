# SPDX-License-Identifier: Apache-2.0
"""Greedy answers of the mini model on the mini benchmark, as the loop gave them that `model.generate` replaced.

`fixtures/mini_greedy_texts.json` was written by that loop (float32, batches of 12, at most 32 new tokens).
"""

import json
from pathlib import Path

import pytest

from dmole.config import EvaluationSettings
from dmole.data.collate import collate
from dmole.data.reading import read_stream
from dmole.runs.evaluation import generation_queue
from dmole.runs.generation import generate
from mini_cmit.model.shipped import load_mini_model
from mini_cmit.tasks.build import build_mini

TEXTS = Path(__file__).parent / "fixtures" / "mini_greedy_texts.json"


def test_the_answers_are_those_of_the_loop_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMOLE_CACHE", str(tmp_path / "cache"))
    stream = read_stream(build_mini(tmp_path / "mini", train=2, validation=1, test=4, workers=1), check_images=False)
    vlm = load_mini_model()
    expected = json.loads(TEXTS.read_text())
    said: dict[str, str] = {}
    for items in generation_queue(vlm, stream.tasks, 18):
        names = [f"{task}/{sample.id}" for task, sample in items]
        batch = collate(vlm, [sample for _, sample in items], with_answers=False)
        answers = generate(vlm, batch, EvaluationSettings(max_new_tokens=32), names)
        said |= {name: answer.text for name, answer in zip(names, answers, strict=True)}
        assert not any(answer.cut for answer in answers)
    assert len(expected) == 36 and len(set(expected.values())) > 20
    assert said == expected
