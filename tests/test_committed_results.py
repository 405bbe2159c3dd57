# SPDX-License-Identifier: Apache-2.0
"""The committed runs over the full mini stream: every number follows from the raw predictions, and says what we say."""

from pathlib import Path

import numpy as np
import pytest

from dmole.reports.comparison import compare
from dmole.reports.continual import aggregates
from dmole.reports.stored import StoredRun, read_runs
from dmole.reports.verify import verify_results
from mini_cmit.tasks.build import TASKS

RESULTS = Path(__file__).resolve().parent.parent / "results"
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def runs() -> list[StoredRun]:
    return read_runs(RESULTS / "mini")


def of(runs: list[StoredRun], method: str) -> list[StoredRun]:
    return [run for run in runs if run.method == method]


@pytest.mark.parametrize("folder", ["mini", "mini_matched_neighbour"])
def test_every_number_follows_from_the_predictions(folder: str) -> None:
    report = verify_results(RESULTS / folder)
    assert report.ok, str(report)


def test_all_methods_and_seeds_are_there(runs: list[StoredRun]) -> None:
    methods = ("zero_shot", "finetune", "joint", "seq_ft", "dmole")
    assert {(run.method, run.seed) for run in runs} == {(method, seed) for method in methods for seed in SEEDS}
    assert all(run.tasks == TASKS for run in runs)


def test_sequential_finetuning_forgets(runs: list[StoredRun]) -> None:
    for run in of(runs, "seq_ft"):
        bwt = aggregates(run.matrix).bwt
        assert bwt is not None and bwt <= -10.0


def test_finetune_learns_every_task(runs: list[StoredRun]) -> None:
    learned = np.mean([np.diagonal(run.matrix[1:]) for run in of(runs, "finetune")], axis=0)
    untrained = np.mean([run.matrix[0] for run in of(runs, "finetune")], axis=0)
    assert (learned >= untrained + 10.0).all(), dict(zip(TASKS, (learned - untrained).round(1), strict=True))


@pytest.mark.parametrize("statistic", ["Last", "BWT"])
def test_dmole_beats_sequential_finetuning(runs: list[StoredRun], statistic: str) -> None:
    (row,) = [one for one in compare(runs, "dmole", "seq_ft") if one.statistic == statistic]
    assert row.seeds == SEEDS and row.over_seeds is not None
    assert row.over_seeds.low > 0.0 and row.over_samples.low > 0.0


def test_routing_and_its_cost_are_recorded(runs: list[StoredRun]) -> None:
    for run in of(runs, "dmole"):
        last = run.result["routing"][str(len(TASKS))]
        assert last["samples"] == 900 and 0.0 <= last["base_model_share"] <= 1.0
        shares = run.result["profile"]["method_share_of_run"]
        assert 0.0 < shares["proxy_seconds"] < 1.0 and 0.0 < shares["router_seconds"] < 1.0
