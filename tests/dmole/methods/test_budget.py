# SPDX-License-Identifier: Apache-2.0
"""The budget: what it counts, how much it is, and which budgets are refused before anything is read or trained."""

import math

import pytest

from dmole.methods.budget import BudgetSettings, check_budget, group_by_unit, layer_of, total_budget

CANDIDATES = {
    "vision": tuple(f"vision.layers.{i}.{name}" for i in range(2) for name in ("q", "k")),
    "language": tuple(f"language.layers.{i}.{name}" for i in range(3) for name in ("q", "k")),
}


def test_weights_by_hand() -> None:
    sizes = {"vision": {"v.0.q": 20, "v.1.q": 20}, "language": {"l.0.q": 40, "l.1.q": 40}}
    # Half of four linears of 30 weights a rank on average, at rank 8.
    assert BudgetSettings().weights(8, sizes) == 8 * 2 * 30
    assert BudgetSettings(fraction=0.25, unit="layer").weights(8, sizes) == 8 * 1 * 30


def test_layer_of() -> None:
    assert layer_of("model.vision_tower.encoder.layers.3.self_attn.q_proj") == "model.vision_tower.encoder.layers.3"
    assert layer_of("blocks.0.mlp.1") == "blocks.0"
    with pytest.raises(ValueError, match="got 'projector.linear', which lies in no numbered layer"):
        layer_of("projector.linear")
    assert list(group_by_unit(CANDIDATES["vision"], "layer")) == ["vision.layers.0", "vision.layers.1"]
    with pytest.raises(ValueError, match="budget.unit: got 'block'; expected one of"):
        group_by_unit(CANDIDATES["vision"], "block")  # type: ignore[arg-type]


def test_half_of_the_candidates() -> None:
    paper = {tower: tuple(f"{tower}.{i}.{n}" for i in range(24) for n in ("qkv", "out")) for tower in CANDIDATES}
    assert total_budget(paper, fraction=0.5) == 48
    assert total_budget(paper, fraction=0.5, unit="layer") == 24
    assert total_budget(CANDIDATES, fraction=0.25) == 3  # 2.5 rounds up
    with pytest.raises(ValueError, match=r"budget.fraction: got nan; expected a share of the candidates in \(0, 1\]"):
        total_budget(CANDIDATES, fraction=math.nan)


@pytest.mark.parametrize("budget", [2, 5, 10])
def test_budgets_that_fit(budget: int) -> None:
    check_budget(CANDIDATES, budget=budget)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"budget": 11},
            r"budget: got 11 linears, more than the 10 candidates \(vision 4, language 6\). Lower budget.fraction",
        ),
        ({"budget": 6, "unit": "layer"}, r"budget: got 6 layers, more than the 5 candidates \(vision 2, language 3\)"),
        (
            {"budget": 1},
            r"budget: got 1 linears, smaller than one linear per tower \(vision 4, language 6\); expected at least 2",
        ),
        ({"budget": 0}, "smaller than one linear per tower"),
    ],
)
def test_budgets_that_do_not_fit(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_budget(CANDIDATES, **arguments)  # type: ignore[arg-type]


def test_towers_without_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match=r"candidates\['vision'\]: got no linear; expected at least one"):
        check_budget({"vision": (), "language": ("a.0",)}, budget=1)
    with pytest.raises(ValueError, match="candidates: got no tower"):
        check_budget({}, budget=1)
    check_budget({"language": CANDIDATES["language"]}, budget=1)
