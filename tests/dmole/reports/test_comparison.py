# SPDX-License-Identifier: Apache-2.0
"""Paired differences between methods, from matrices and from raw predictions."""

import json
import shutil
from pathlib import Path

import pytest

from dmole.reports.comparison import compare, comparison_table, sample_points
from dmole.reports.stored import ResultsError, read_runs


def test_differences_and_intervals(results: Path) -> None:
    found = {item.statistic: item for item in compare(read_runs(results), "keeper", "loser", resamples=2000)}
    last = found["Last"]
    assert last.seeds == (0, 1)
    # Seed 0: 275 / 3 - 125 / 3 = 50; seed 1: 250 / 3 - 125 / 3 = 41.67.
    assert last.differences == pytest.approx((50.0, 125 / 3))
    assert last.over_seeds is not None and last.over_seeds.mean == pytest.approx((50 + 125 / 3) / 2)
    assert last.over_seeds.low < 0 < last.over_seeds.high  # two seeds: t_1 is 12.7
    assert last.over_samples.mean == pytest.approx(last.over_seeds.mean)
    assert last.over_samples.excludes_zero and last.over_samples.count == 12
    for item in found.values():
        assert item.over_seeds is not None
        assert item.over_samples.mean == pytest.approx(item.over_seeds.mean)


def test_sample_points_average_to_the_matrix(results: Path) -> None:
    for run in read_runs(results):
        if run.method == "finetune":
            continue
        points = sample_points(run)
        for i, task in enumerate(run.tasks):
            assert points[task].mean(axis=1) == pytest.approx(run.matrix[:, i])


def test_one_seed_has_no_interval_over_seeds(results: Path) -> None:
    shutil.rmtree(results / "runs" / "loser-seed1-default")
    found = compare(read_runs(results), "keeper", "loser", resamples=200)
    assert all(item.over_seeds is None and item.seeds == (0,) for item in found)
    assert comparison_table(found).rows[0][3] == "-"


def test_table_marks_what_excludes_zero(results: Path) -> None:
    table = comparison_table(compare(read_runs(results), "keeper", "loser", resamples=500))
    row = next(row for row in table.rows if row[2] == "Last")
    assert row[0] == "keeper - loser" and row[4].startswith("+45.83 [") and row[4].endswith("] *")
    assert not row[3].endswith("*")


def test_nothing_in_common_is_an_error(results: Path) -> None:
    with pytest.raises(ResultsError, match="keeper and finetune have no common seed and order with complete last rows"):
        compare(read_runs(results), "keeper", "finetune")


def test_missing_predictions_are_an_error(results: Path) -> None:
    import gzip

    path = results / "runs" / "keeper-seed0-default" / "predictions.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()][:-1]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    with pytest.raises(ResultsError, match="stage 3, task letters lacks predictions; expected one per reference"):
        compare(read_runs(results), "keeper", "loser")
