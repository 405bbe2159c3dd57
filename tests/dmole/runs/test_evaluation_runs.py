# SPDX-License-Identifier: Apache-2.0
"""Whole runs of D-MoLE with beams and with sampling: every file verifies, and batches decide no answer."""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dmole.config import RunConfig
from dmole.reports.verify import verify_results
from dmole.runs.runner import run

Configure = Callable[..., RunConfig]
SMALL = (
    "methods=dmole",
    "train_samples=4",
    "training.learning_rate=0.05",
    "dmole.router={epochs: 100, learning_rate: 0.01, margin: 1.3, top_k: 1}",
)


def answers(output: Path) -> list[dict[str, Any]]:
    (path,) = output.glob("runs/*/predictions.jsonl.gz")
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


@pytest.mark.parametrize(
    "way",
    [
        ("evaluation.num_beams=3",),
        ("evaluation.do_sample=true", "evaluation.temperature=1.5", "evaluation.seed=1"),
    ],
    ids=["beams", "sampled"],
)
def test_the_size_of_a_batch_decides_no_answer(way: tuple[str, ...], toy_config: Configure, tmp_path: Path) -> None:
    config = toy_config(*SMALL, *way)
    first = answers(run(config, console=Console(file=io.StringIO())))
    assert verify_results(Path(config.output)).ok
    alone = toy_config(*SMALL, *way, "evaluation.per_device_eval_batch_size=1", f"output={tmp_path / 'alone'}")
    assert answers(run(alone, console=Console(file=io.StringIO()))) == first
    routes = {tuple(line["route"]) for line in first if line["stage"] == 3}
    assert len(routes) > 1, "batches should mix routes"
    assert len({line["prediction"] for line in first if line["stage"] == 3}) > 1


def test_another_seed_samples_other_answers(toy_config: Configure, tmp_path: Path) -> None:
    said = []
    for seed in (1, 2):
        settings = ("evaluation.do_sample=true", f"evaluation.seed={seed}", f"output={tmp_path / str(seed)}")
        said.append(answers(run(toy_config(*SMALL, *settings), console=Console(file=io.StringIO()))))
    assert [line["route"] for line in said[0]] == [line["route"] for line in said[1]]
    assert said[0] != said[1]
