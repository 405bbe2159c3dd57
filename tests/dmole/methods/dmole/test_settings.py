# SPDX-License-Identifier: Apache-2.0
"""Settings are checked when built; the ablations change what they say and nothing else."""

import dataclasses

import pytest

from dmole.methods.budget import BudgetSettings
from dmole.methods.dmole.settings import DMoLESettings, RouterSettings, ablated


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            DMoLESettings,
            {"routing": "vote"},
            "dmole.routing is 'vote'; expected one of 'per_sample', 'batch_vote'",
        ),
        (DMoLESettings, {"vision_floor": 1.0}, r"dmole.vision_floor is 1.0; expected a number in \[0, 1\)"),
        (DMoLESettings, {"proxy_min_samples": 0}, "dmole.proxy_min_samples is 0; expected at least 1"),
        (RouterSettings, {"decoder": "tanh"}, "router.decoder is 'tanh'; expected 'sigmoid' or 'linear'"),
        (RouterSettings, {"quantile": 1.5}, r"router.quantile is 1.5; expected a number in \(0, 1\]"),
        (RouterSettings, {"top_k": 0}, "router.top_k is 0; expected an integer of at least 1"),
    ],
)
def test_bad_values_are_refused(kind: type, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**change)


def test_defaults_are_the_papers() -> None:
    settings = DMoLESettings()
    assert BudgetSettings().fraction == 0.5 and settings.vision_floor == 0.0 and settings.proxy_fraction == 0.01
    assert settings.score_aggregation == "norm" and settings.routing == "per_sample"
    router = settings.router
    assert (router.hidden, router.epochs, router.learning_rate, router.top_k) == (128, 100, 1e-3, 2)
    assert (router.decoder, router.quantile) == ("sigmoid", 0.95)


def test_ablations() -> None:
    full = DMoLESettings(proxy_min_samples=7)
    changed = {
        name: {
            field.name
            for field in dataclasses.fields(full)
            if getattr(ablated(full, name), field.name) != getattr(full, field.name)
        }
        for name in ("v1", "v2", "v3", "v4")
    }
    assert changed == {
        "v1": {"towers"},
        "v2": {"towers"},
        "v3": {"curriculum"},
        "v4": {"allocator", "routing", "training_neighbour"},
    }
    assert ablated(full, "v1").towers == "language" and ablated(full, "v2").towers == "vision"
    with pytest.raises(ValueError, match="ablation: got 'v5'; expected one of v1, v2, v3, v4"):
        ablated(full, "v5")  # type: ignore[arg-type]
