# SPDX-License-Identifier: Apache-2.0
"""How many experts each tower gets: ``B_M = r_M B_total``, ``r_M = Score_M / (Score_LLM + Score_Vision)``.

    Score_M   = ||dL/dW_M||                              Eq. 13, how strongly the task pulls at module M
    r_M       = Score_M / (Score_LLM + Score_Vision)     Eq. 14, the module's update ratio
    B_M       = r_M B_total                              Eq. 15, its share of the expert budget

Computed once per task, before training, from the scores that the allocator needs anyway. Whole experts are placed, so
B_vision is rounded (half up) and B_language is what is left: the two always sum to B_total.

Source: Ge et al., "Dynamic Mixture of Curriculum LoRA Experts for Continual Multimodal Instruction Tuning" (D-MoLE),
ICML 2025, arXiv 2506.11672, Eq. 13-15. Their public code sums the layers' norms and grants the vision tower a quarter
of the budget: ``aggregation="sum", vision_floor=0.25``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

ScoreAggregation = Literal["norm", "sum"]


def module_scores(
    scores: Mapping[str, Mapping[str, float]], *, aggregation: ScoreAggregation = "norm"
) -> dict[str, float]:
    """Equals ``{tower: sqrt(sum(s ** 2))}`` ("norm", Eq. 13) or ``{tower: sum(s)}`` ("sum", the public code).

    ``scores[tower][linear]`` is a layer's gradient norm. The root of the sum of squared layer norms is the norm of the
    tower's whole gradient, up to the bias term that the layer score adds instead of squaring.
    """
    if aggregation not in get_args(ScoreAggregation):
        raise ValueError(f"score_aggregation: got {aggregation!r}; expected one of {get_args(ScoreAggregation)}.")
    if aggregation == "sum":
        return {tower: math.fsum(by_linear.values()) for tower, by_linear in scores.items()}
    return {tower: math.sqrt(math.fsum(s * s for s in by_linear.values())) for tower, by_linear in scores.items()}


def update_ratios(module_score: Mapping[str, float]) -> dict[str, float]:
    """Equals ``{tower: score / sum of scores}`` (Eq. 14).

    Raises ValueError for a score that is negative or not finite, and when every score is zero: a task that moves no
    candidate weight says nothing about where its experts belong.
    """
    for tower, score in module_score.items():
        if not math.isfinite(score) or score < 0:
            raise ValueError(
                f"module_score[{tower!r}]: got {score}; expected a finite number >= 0. Look for NaN or overflow in the "
                f"loss of the proxy pass."
            )
    total = math.fsum(module_score.values())
    if total == 0:
        raise ValueError(
            f"module_score: got 0 for every tower of {tuple(module_score)}; expected a gradient somewhere. Check that "
            f"the proxy samples have answer tokens."
        )
    return {tower: score / total for tower, score in module_score.items()}


def split_budget(
    ratios: Mapping[str, float], capacities: Mapping[str, int], total: int, *, vision_floor: float = 0.0
) -> dict[str, int]:
    """Equals ``B_vision = round(r_vision * total)``, ``B_language = total - B_vision`` (Eq. 15), within bounds.

    Args:
        ratios: ``r_M`` per tower, summing to 1. One tower alone takes the whole budget.
        capacities: candidates per tower, in the same unit as ``total``.
        total: ``B_total``.
        vision_floor: the smallest share of the budget that the tower named "vision" may get.

    No tower gets fewer than one expert or more than its candidates; what a full tower cannot take goes to the other.
    Raises ValueError when no such split exists (``methods.budget.check_budget`` finds that out before training).
    """
    towers = tuple(ratios)
    if set(towers) != set(capacities) or not 1 <= len(towers) <= 2:
        raise ValueError(
            f"ratios: got towers {towers} with capacities for {tuple(capacities)}; expected the same one or two towers."
        )
    if len(towers) == 1:
        return {towers[0]: _bounded(towers[0], total, low=1, high=capacities[towers[0]], wanted=total, exact=True)}
    first = "vision" if "vision" in towers else towers[0]
    second = next(tower for tower in towers if tower != first)
    floor = floor_count(total, vision_floor) if first == "vision" else 0
    low = max(1, floor, total - capacities[second])
    high = min(capacities[first], total - 1)
    share = _bounded(first, total, low=low, high=high, wanted=math.floor(ratios[first] * total + 0.5))
    # In the caller's order of towers, so that printed tables and JSON keep one order.
    return {tower: share if tower == first else total - share for tower in towers}


def even_split(capacities: Mapping[str, int], total: int) -> dict[str, int]:
    """The budget without a curriculum (ablation v3): the same number to each tower, as far as there is room."""
    return split_budget({tower: 1.0 / len(capacities) for tower in capacities}, capacities, total)


def proportional_split(capacities: Mapping[str, int], total: int) -> dict[str, int]:
    """The budget without an allocator (ablation v4): each tower gets its share of the candidates."""
    return split_budget(update_ratios({t: float(n) for t, n in capacities.items()}), capacities, total)


def floor_count(total: int, vision_floor: float) -> int:
    """Experts that ``vision_floor`` of ``total`` guarantees: the smallest whole number that is at least the share."""
    if not 0.0 <= vision_floor < 1.0:
        raise ValueError(f"vision_floor: got {vision_floor}; expected a share of the budget in [0, 1), such as 0.25.")
    # 0.1 * 30 is 3.0000000000000004: without the slack a float's last digit would cost a whole expert.
    return math.ceil(vision_floor * total - 1e-9)


def _bounded(tower: str, total: int, *, low: int, high: int, wanted: int, exact: bool = False) -> int:
    if low > high or (exact and not low <= wanted <= high):
        raise ValueError(
            f"budget: got {total}; {tower} would have to hold at least {low} and at most {high} of it. Change "
            f"budget.fraction, vision_floor or the candidates."
        )
    return min(max(wanted, low), high)
