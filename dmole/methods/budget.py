# SPDX-License-Identifier: Apache-2.0
"""How many weights a task may train, the same for every method: a share of the candidate linears at `lora.rank`.

    B_total = fraction * candidates        in linears, or in whole layers

A method that places experts places B_total of them (D-MoLE); one with an adapter everywhere lowers its rank
(`parity_rank`). Source: D-MoLE, ICML 2025, arXiv 2506.11672, section 4.2 and appendix A.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from dmole.config_error import require

if TYPE_CHECKING:
    from torch import nn

BudgetUnit = Literal["linear", "layer"]
Candidates = Mapping[str, Sequence[str]]
# sizes[tower][linear] is in + out: the weights of an expert of rank 1 there.
Sizes = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, kw_only=True)
class BudgetSettings:
    """How many weights a task may train: experts of rank `lora.rank` on a share of the candidate linears."""

    # The share of the candidates: half in D-MoLE's paper (48 of 96 linears). A method with an adapter on all of them
    # gets the rank that trains as many weights.
    fraction: float = 0.5
    # What is counted: linears (D-MoLE's public code) or whole layers (its appendix A: 24 of 48).
    unit: BudgetUnit = "linear"

    def __post_init__(self) -> None:
        # Shares above 1 are not refused here: check_budget names the candidates as well.
        require(self.fraction > 0, "budget.fraction", self.fraction, "a number in (0, 1]")
        allowed = get_args(BudgetUnit)
        require(self.unit in allowed, "budget.unit", self.unit, f"one of {', '.join(map(repr, allowed))}")

    def of(self, candidates: Candidates) -> int:
        """B_total over these candidates."""
        return total_budget(candidates, fraction=self.fraction, unit=self.unit)

    def weights(self, rank: int, sizes: Sizes) -> float:
        """The weights of B_total experts of this rank on linears of mean size."""
        names = {tower: tuple(linears) for tower, linears in sizes.items()}
        share = self.of(names) / sum(capacities(names, self.unit).values())
        return rank * share * sum(sum(linears.values()) for linears in sizes.values())


def linear_sizes(model: nn.Module, candidates: Candidates) -> dict[str, dict[str, int]]:
    """`Sizes` of the linears called so in `model`."""

    def size(name: str) -> int:
        linear = cast(Any, model.get_submodule(name))
        return int(linear.in_features + linear.out_features)

    return {tower: {name: size(name) for name in names} for tower, names in candidates.items()}


def parity_rank(rank: int, budget: BudgetSettings, sizes: Sizes) -> int:
    """The rank on ALL candidates that trains closest to as many weights as the budget does at `rank`; at least 1.

    Which linears a task's experts get may differ by task, so their count is taken as the budget x the mean linear.
    """
    return max(1, round(budget.weights(rank, sizes) / sum(sum(linears.values()) for linears in sizes.values())))


def layer_of(linear: str) -> str:
    """The layer that a linear belongs to: its name up to the first number.

    "vision_tower.encoder.layers.3.self_attn.q_proj" -> "vision_tower.encoder.layers.3".
    """
    parts = linear.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    raise ValueError(
        f"candidates: got {linear!r}, which lies in no numbered layer; expected a name such as 'layers.3.q_proj'. "
        f"Use budget.unit='linear'."
    )


def group_by_unit(linears: Sequence[str], unit: BudgetUnit) -> dict[str, tuple[str, ...]]:
    """What the budget counts: each linear by itself, or each layer with all its candidate linears. Order is kept."""
    if unit not in get_args(BudgetUnit):
        raise ValueError(f"budget.unit: got {unit!r}; expected one of {get_args(BudgetUnit)}.")
    if unit == "linear":
        return {linear: (linear,) for linear in linears}
    groups: dict[str, tuple[str, ...]] = {}
    for linear in linears:
        layer = layer_of(linear)
        groups[layer] = (*groups.get(layer, ()), linear)
    return groups


def capacities(candidates: Candidates, unit: BudgetUnit) -> dict[str, int]:
    """How many experts (unit "linear") or layers of experts (unit "layer") each tower has room for."""
    return {tower: len(group_by_unit(linears, unit)) for tower, linears in candidates.items()}


def check_budget(candidates: Candidates, *, budget: int, unit: BudgetUnit = "linear") -> None:
    """Raises ValueError unless some split of ``budget`` gives every tower at least one unit and at most its candidates.

    Reads names only, so it can (and does) run before any data is read or any step is trained.
    """
    room = capacities(candidates, unit)
    if not room:
        raise ValueError("candidates: got no tower; expected linears of at least one of 'vision' and 'language'.")
    for tower, n in room.items():
        if n == 0:
            raise ValueError(
                f"candidates[{tower!r}]: got no linear; expected at least one. Widen the candidates filter or leave "
                f"the {tower} tower out."
            )
    total = sum(room.values())
    listed = ", ".join(f"{tower} {n}" for tower, n in room.items())
    if budget > total:
        raise ValueError(
            f"budget: got {budget} {unit}s, more than the {total} candidates ({listed}). Lower budget.fraction to at "
            f"most 1, or widen the candidates."
        )
    if budget < len(room):
        raise ValueError(
            f"budget: got {budget} {unit}s, smaller than one {unit} per tower ({listed}); expected at least "
            f"{len(room)}. Raise budget.fraction."
        )


def total_budget(candidates: Candidates, *, fraction: float, unit: BudgetUnit = "linear") -> int:
    """B_total: ``fraction`` of all candidates, rounded half up. The paper's fraction is 0.5 (48 of 96 linears)."""
    if not math.isfinite(fraction) or fraction <= 0:
        raise ValueError(f"budget.fraction: got {fraction}; expected a share of the candidates in (0, 1], such as 0.5.")
    return math.floor(fraction * sum(capacities(candidates, unit).values()) + 0.5)
