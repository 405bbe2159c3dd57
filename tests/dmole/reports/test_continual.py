# SPDX-License-Identifier: Apache-2.0
"""The aggregates of continual learning on matrices small enough to work by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from dmole.reports import continual

NAN = math.nan
# Rows: untrained, after task 1, 2, 3.
MATRIX = np.array([[10.0, 20.0, 30.0], [80.0, 25.0, 28.0], [60.0, 90.0, 40.0], [50.0, 70.0, 95.0]])


def test_dmole_convention_by_hand() -> None:
    assert continual.dmole_average_per_task(MATRIX) == pytest.approx([190 / 3, 185 / 3, 163 / 3])
    assert continual.dmole_last_per_task(MATRIX) == pytest.approx([50, 70, 95])
    # Task 1: ((60 - 80) + (50 - 80)) / 2 = -25; task 2: 70 - 90 = -20; task 3 undefined.
    transfer = continual.dmole_backward_transfer_per_task(MATRIX)
    assert transfer[:2] == pytest.approx([-25, -20]) and np.isnan(transfer[2])
    assert continual.dmole_average(MATRIX) == pytest.approx((190 + 185 + 163) / 9)
    assert continual.dmole_last(MATRIX) == pytest.approx(215 / 3)
    assert continual.dmole_backward_transfer(MATRIX) == pytest.approx(-22.5)


def test_coin_convention_by_hand() -> None:
    assert continual.coin_accuracy(MATRIX) == pytest.approx(215 / 3)
    assert continual.coin_mean_average_accuracy(MATRIX) == pytest.approx((80 + (60 + 90) / 2 + 215 / 3) / 3)
    assert continual.coin_backward_transfer(MATRIX) == pytest.approx((-30 - 20 + 0) / 3)


def test_gem_convention_by_hand() -> None:
    assert continual.gem_backward_transfer(MATRIX) == pytest.approx((-30 - 20) / 2)
    # Task 2 before it is learned: A[1][2] - A[0][2] = 5; task 3: A[2][3] - A[0][3] = 10.
    assert continual.forward_transfer(MATRIX) == pytest.approx(7.5)
    assert continual.mean_first(MATRIX) == pytest.approx((80 + 90 + 95) / 3)
    assert continual.mean_final(MATRIX) == pytest.approx(215 / 3)


def test_row_zero_counts_in_no_dmole_number() -> None:
    other = MATRIX.copy()
    other[0] = 99.0
    assert continual.aggregates(other) == continual.aggregates(MATRIX)


def test_one_task_has_no_transfer() -> None:
    single = np.array([[5.0], [70.0]])
    assert continual.aggregates(single) == continual.Aggregates(avg=70.0, last=70.0, bwt=None)
    assert math.isnan(continual.gem_backward_transfer(single)) and math.isnan(continual.forward_transfer(single))
    assert "FWT" not in continual.other_conventions(single)


def test_aggregates_follow_the_cells_that_were_measured() -> None:
    full = continual.aggregates(MATRIX)
    assert full.last == pytest.approx(215 / 3) and full.bwt == pytest.approx(-22.5)
    diagonal = np.full((4, 3), NAN)
    diagonal[0] = MATRIX[0]
    for i in range(3):
        diagonal[i + 1, i] = MATRIX[i + 1, i]
    assert continual.aggregates(diagonal) == continual.Aggregates(avg=None, last=pytest.approx(265 / 3), bwt=None)
    joint = np.full((4, 3), NAN)
    joint[0], joint[3] = MATRIX[0], MATRIX[3]
    assert continual.aggregates(joint) == continual.Aggregates(avg=None, last=pytest.approx(215 / 3), bwt=None)
    zero_shot = np.full((4, 3), NAN)
    zero_shot[0] = MATRIX[0]
    assert continual.aggregates(zero_shot) == continual.Aggregates(avg=None, last=20.0, bwt=None)
    unfinished = MATRIX.copy()
    unfinished[3] = NAN
    assert continual.aggregates(unfinished) == continual.Aggregates(avg=None, last=None, bwt=None)
    assert continual.other_conventions(unfinished) == {}
    assert set(continual.other_conventions(MATRIX)) == {
        "CoIN ACC", "CoIN MAA", "CoIN BWT (over N)", "GEM BWT (over N-1)", "FWT", "MFT", "MFN",
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 3), (4,), (1, 0)])
def test_a_matrix_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"matrix has shape .*; expected \[N \+ 1, N\]"):
        continual.dmole_last(np.zeros(shape))


def test_paired_t_interval_by_hand() -> None:
    interval = continual.paired_t_interval([1.0, 2.0, 3.0])
    # mean 2, standard deviation 1, t_2(0.975) = 4.302653
    assert interval.mean == 2.0
    assert interval.high - 2.0 == pytest.approx(4.302653 / math.sqrt(3), abs=1e-6)
    assert not interval.excludes_zero
    assert continual.paired_t_interval([9.0, 10.0, 11.0]).excludes_zero
    assert continual.paired_t_interval([-9.0, -10.0, -11.0]).excludes_zero
    assert str(interval) == "+2.00 [-0.48, +4.48]"


def test_paired_t_interval_agrees_with_scipy() -> None:
    d = [0.3, 1.9, -0.4, 2.2, 1.1]
    expected = stats.ttest_1samp(d, 0.0).confidence_interval(0.9)
    got = continual.paired_t_interval(d, level=0.9)
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high))


def test_interval_errors() -> None:
    with pytest.raises(ValueError, match="differences has 1 entries; expected at least 2, one per seed"):
        continual.paired_t_interval([1.0])
    with pytest.raises(ValueError, match="expected finite numbers"):
        continual.paired_t_interval([1.0, NAN])
    with pytest.raises(ValueError, match="level is 95; expected a number in"):
        continual.paired_t_interval([1.0, 2.0], level=95)
    with pytest.raises(ValueError, match=r"tasks of shapes \[\[0\]\]"):
        continual.paired_bootstrap([np.zeros(0)])


def test_paired_bootstrap_against_the_normal_interval() -> None:
    generator = np.random.default_rng(3)
    tasks = [generator.normal(2.0, 10.0, 400), generator.normal(4.0, 10.0, 100)]
    got = continual.paired_bootstrap(tasks, resamples=4000)
    mean = float(np.mean([d.mean() for d in tasks]))
    half = 1.96 * math.sqrt(sum(d.var() / len(d) for d in tasks)) / 2
    assert got.mean == pytest.approx(mean)
    assert (got.low, got.high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)
    assert got.count == 500
    assert continual.paired_bootstrap(tasks, resamples=4000) == got  # seeded


def test_contributions_average_to_the_aggregates() -> None:
    generator = np.random.default_rng(0)
    scores = generator.random((4, 3, 50)) * 100  # [stage, task, sample]
    matrix = scores.mean(axis=2)
    for i in range(3):
        parts = continual.per_sample_contributions(scores[:, i], i + 1)
        assert parts["AVG"].mean() == pytest.approx(continual.dmole_average_per_task(matrix)[i])
        assert parts["Last"].mean() == pytest.approx(matrix[3, i])
        if i < 2:
            assert parts["BWT"].mean() == pytest.approx(continual.dmole_backward_transfer_per_task(matrix)[i])
        else:
            assert "BWT" not in parts
    with pytest.raises(ValueError, match="stage_learned is 4; expected"):
        continual.per_sample_contributions(scores[:, 0], 4)
