# SPDX-License-Identifier: Apache-2.0
"""Where a new task's experts go: scores of the candidates, budgets of the towers, the chosen linears."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dmole.methods.base import answer_loss
from dmole.methods.budget import Candidates, capacities
from dmole.methods.dmole.allocation import allocate, allocate_uniformly, layer_scores, proxy_subset
from dmole.methods.dmole.curriculum import even_split, module_scores, proportional_split, split_budget, update_ratios
from dmole.methods.dmole.expert_pool import Placement
from dmole.methods.dmole.settings import DMoLESettings
from dmole.methods.settings import MethodSettings

if TYPE_CHECKING:
    from dmole.data.sample import Task
    from dmole.models.vision_language import VisionLanguageModel


def place_experts(
    vlm: VisionLanguageModel, task: Task, candidates: Candidates, *, name: str, settings: MethodSettings, seed: int
) -> Placement:
    """Equations 3 to 5 and 13 to 15 on the pretrained model.

    Args:
        name: of the new expert.
        seed: draws the samples of the proxy.
    """
    options, unit = settings.options_as(DMoLESettings), settings.budget.unit
    budget, room = settings.budget.of(candidates), capacities(candidates, unit)
    scores: dict[str, dict[str, float]] = {}
    towers: dict[str, float] = {}
    if options.allocator == "uniform":
        budgets = proportional_split(room, budget)
        linears = allocate_uniformly(candidates, budgets, unit=unit)
    else:
        subset = proxy_subset(task.train, fraction=options.proxy_fraction, minimum=options.proxy_min_samples, seed=seed)
        scores = layer_scores(
            vlm,
            subset,
            loss=answer_loss,
            candidates=candidates,
            batch_size=options.proxy_batch_size,
            method=options.proxy_method,
        )
        towers = module_scores(scores, aggregation=options.score_aggregation)
        if options.curriculum:
            budgets = split_budget(update_ratios(towers), room, budget, vision_floor=options.vision_floor)
        else:
            budgets = even_split(room, budget)
        linears = allocate(scores, budgets, unit=unit)
    return Placement(
        task=task.name,
        expert=name,
        rank=settings.lora.rank,
        alpha=settings.lora.alpha,
        linears=linears,
        budgets=budgets,
        module_scores=towers,
        scores=scores,
    )
