# SPDX-License-Identifier: Apache-2.0
"""What the results of a run say of D-MoLE: its budget, where its experts are and how large, how its router learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dmole.files import JSON
from dmole.methods.dmole.expert_pool import ExpertPool
from dmole.methods.dmole.routing import Router
from dmole.models.adapters import Adapters, expert_parameters


def method_report(
    candidates: Mapping[str, Sequence[str]],
    budget: int,
    unit: str,
    *,
    pool: ExpertPool,
    router: Router,
    adapters: Adapters,
) -> dict[str, JSON]:
    """`budget` is counted in `unit`; the candidates are counted by tower, the experts' weights by task."""
    return {
        "budget": budget,
        "budget_unit": unit,
        "candidates": {tower: len(names) for tower, names in candidates.items()},
        "experts": pool.to_json(),
        "expert_parameters": {
            placement.task: sum(p.numel() for p in expert_parameters(adapters, placement.expert).values())
            for placement in pool
        },
        "router": {
            "thresholds": router.thresholds,
            "first_and_last_training_error": {task: list(pair) for task, pair in router.training_errors.items()},
        },
    }
