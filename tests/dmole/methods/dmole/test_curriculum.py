# SPDX-License-Identifier: Apache-2.0
"""Eq. 13-15 by hand, and that budgets always sum to the total within the towers' bounds."""

import itertools
import math

import pytest

from dmole.methods.dmole.curriculum import (
    even_split,
    floor_count,
    module_scores,
    proportional_split,
    split_budget,
    update_ratios,
)

SCORES = {"vision": {"v0": 3.0, "v1": 4.0}, "language": {"l0": 6.0, "l1": 8.0, "l2": 0.0}}


def test_module_scores_norm_and_sum() -> None:
    assert module_scores(SCORES) == {"vision": 5.0, "language": 10.0}
    assert module_scores(SCORES, aggregation="sum") == {"vision": 7.0, "language": 14.0}
    with pytest.raises(ValueError, match="score_aggregation: got 'mean'; expected one of"):
        module_scores(SCORES, aggregation="mean")  # type: ignore[arg-type]


def test_the_curriculum_splits_by_update_ratio() -> None:
    ratios = update_ratios(module_scores(SCORES))
    assert ratios == {"vision": pytest.approx(1 / 3), "language": pytest.approx(2 / 3)}
    assert split_budget(ratios, {"vision": 48, "language": 48}, 48) == {"vision": 16, "language": 32}


def test_half_rounds_up_and_the_order_of_towers_is_kept() -> None:
    split = split_budget({"language": 0.5, "vision": 0.5}, {"language": 9, "vision": 9}, 5)
    assert split == {"language": 2, "vision": 3}
    assert list(split) == ["language", "vision"]


def test_no_tower_is_left_empty_and_a_full_tower_hands_on_the_rest() -> None:
    room = {"vision": 4, "language": 20}
    assert split_budget({"vision": 0.0, "language": 1.0}, room, 12) == {"vision": 1, "language": 11}
    assert split_budget({"vision": 1.0, "language": 0.0}, room, 12) == {"vision": 4, "language": 8}
    assert split_budget({"vision": 0.0, "language": 1.0}, room, 24) == {"vision": 4, "language": 20}
    assert split_budget({"vision": 0.0, "language": 1.0}, room, 2) == {"vision": 1, "language": 1}


def test_vision_floor() -> None:
    room = {"vision": 48, "language": 48}
    assert split_budget({"vision": 0.1, "language": 0.9}, room, 48, vision_floor=0.25) == {"vision": 12, "language": 36}
    assert split_budget({"vision": 0.5, "language": 0.5}, room, 48, vision_floor=0.25) == {"vision": 24, "language": 24}
    assert floor_count(30, 0.1) == 3  # 0.1 * 30 is a little more than 3 in floating point
    with pytest.raises(ValueError, match=r"vision_floor: got 1.5; expected a share of the budget in \[0, 1\)"):
        floor_count(10, 1.5)


def test_every_split_sums_to_the_total_within_bounds() -> None:
    for vision, language, floor in itertools.product(range(1, 6), range(1, 6), (0.0, 0.25)):
        for total in range(2, vision + language + 1):
            if floor_count(total, floor) > min(vision, total - 1):
                continue
            for tenth in range(11):
                split = split_budget(
                    {"vision": tenth / 10, "language": 1 - tenth / 10},
                    {"vision": vision, "language": language},
                    total,
                    vision_floor=floor,
                )
                assert sum(split.values()) == total
                assert max(1, floor_count(total, floor)) <= split["vision"] <= vision
                assert 1 <= split["language"] <= language


def test_one_tower_takes_all() -> None:
    assert split_budget({"language": 1.0}, {"language": 7}, 4) == {"language": 4}
    with pytest.raises(ValueError, match="budget: got 8; language would have to hold at least 1 and at most 7 of it"):
        split_budget({"language": 1.0}, {"language": 7}, 8)


def test_splits_without_a_curriculum() -> None:
    assert even_split({"vision": 48, "language": 48}, 48) == {"vision": 24, "language": 24}
    assert even_split({"vision": 4, "language": 20}, 12) == {"vision": 4, "language": 8}
    assert proportional_split({"vision": 10, "language": 30}, 20) == {"vision": 5, "language": 15}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_scores_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"module_score\['vision'\]: got .*; expected a finite number >= 0"):
        update_ratios({"vision": bad, "language": 1.0})


def test_a_task_without_any_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0 for every tower of .*expected a gradient somewhere"):
        update_ratios({"vision": 0.0, "language": 0.0})


def test_impossible_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="budget: got 9; vision would have to hold at least 5 and at most 4 of it"):
        split_budget({"vision": 0.5, "language": 0.5}, {"vision": 4, "language": 4}, 9)
    with pytest.raises(ValueError, match="expected the same one or two towers"):
        split_budget({"vision": 1.0}, {"language": 4}, 2)
