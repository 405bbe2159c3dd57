# SPDX-License-Identifier: Apache-2.0
"""Which linears get an expert: the top B_M of tower M by ``score(l) = ||dL/dW_l||_F + ||dL/db_l||``.

The score is the norm of the loss gradient with respect to the PRETRAINED weight, of the pretrained model without any
expert, accumulated over a small random subset of the task's training data, with no update in between (Eq. 3). The
gradients of all batches are summed before the norm is taken. The B_M best of each tower are chosen (Eq. 4-5).

Source: D-MoLE, ICML 2025, arXiv 2506.11672, Eq. 3-5 and appendix A; "accumulated" and "weight + bias" follow the
authors' public code.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from dmole.data.collate import collate
from dmole.methods.budget import BudgetUnit, Candidates, capacities, group_by_unit
from dmole.methods.dmole.curriculum import floor_count
from dmole.models.adapters import as_pretrained
from dmole.models.towers import VISION
from dmole.training.batches import pieces_of
from dmole.training.processes import process
from dmole_kernels import GradNormRecorder, MultiLoRALinear

if TYPE_CHECKING:
    from dmole.data.collate import Batch
    from dmole.data.sample import Sample
    from dmole.models.vision_language import VisionLanguageModel


def check_vision_floor(candidates: Candidates, *, budget: int, unit: BudgetUnit, vision_floor: float) -> None:
    """Raises ValueError where the vision tower cannot take `vision_floor` of the budget and leave the other its unit.

    Reads names only, so it runs before any data is read.
    """
    room = capacities(candidates, unit)
    if "vision" in room:
        floor = floor_count(budget, vision_floor)
        most = min(room["vision"], budget - len(room) + 1)
        if floor > most:
            listed = ", ".join(f"{tower} {n}" for tower, n in room.items())
            raise ValueError(
                f"vision_floor: got {vision_floor}, which is {floor} of {budget} {unit}s; the vision tower can take "
                f"at most {most} ({listed}). Lower vision_floor or budget.fraction."
            )


def allocate(
    scores: Mapping[str, Mapping[str, float]], budgets: Mapping[str, int], *, unit: BudgetUnit = "linear"
) -> dict[str, tuple[str, ...]]:
    """The linears that get an expert, per tower, in the order of ``scores`` (Eq. 4-5).

    Args:
        scores: ``scores[tower][linear]``, every candidate once, in depth order.
        budgets: units per tower. A layer's score is the root of the sum of its linears' squared scores.

    Equal scores go to the earlier linear, so that the choice depends on nothing but its arguments.
    """
    if set(scores) != set(budgets):
        raise ValueError(f"budgets: got towers {tuple(budgets)}; expected {tuple(scores)}, those that were scored.")
    chosen: dict[str, tuple[str, ...]] = {}
    for tower, by_linear in scores.items():
        groups = group_by_unit(tuple(by_linear), unit)
        budget = budgets[tower]
        if not 1 <= budget <= len(groups):
            raise ValueError(
                f"budgets[{tower!r}]: got {budget}; expected 1 to {len(groups)}, the {unit}s of the tower. "
                f"check_budget tells before training."
            )
        for linear, score in by_linear.items():
            if not math.isfinite(score):
                raise ValueError(f"scores[{tower!r}][{linear!r}]: got {score}; expected a finite number.")
        strength = {g: math.sqrt(math.fsum(by_linear[m] ** 2 for m in members)) for g, members in groups.items()}
        best = set(sorted(groups, key=lambda g: -strength[g])[:budget])  # sorted() is stable: ties keep depth order
        chosen[tower] = tuple(m for g, members in groups.items() if g in best for m in members)
    return chosen


def allocate_uniformly(
    candidates: Candidates, budgets: Mapping[str, int], *, unit: BudgetUnit = "linear"
) -> dict[str, tuple[str, ...]]:
    """The placement without an allocator (ablation v4): units at even distances through the depth of each tower."""
    chosen: dict[str, tuple[str, ...]] = {}
    for tower, linears in candidates.items():
        groups = group_by_unit(linears, unit)
        n, budget = len(groups), budgets[tower]
        if not 1 <= budget <= n:
            raise ValueError(f"budgets[{tower!r}]: got {budget}; expected 1 to {n}, the {unit}s of the tower.")
        # The middle of each of `budget` equal spans of the depth.
        picked = {(2 * i + 1) * n // (2 * budget) for i in range(budget)}
        chosen[tower] = tuple(m for i, members in enumerate(groups.values()) if i in picked for m in members)
    return chosen


def proxy_subset(
    samples: Sequence[Sample], *, fraction: float = 0.01, minimum: int = 1, seed: int = 0
) -> tuple[Sample, ...]:
    """A random ``fraction`` of the samples, at least ``minimum`` of them (or all there are), in their original order.

    The paper scores on 1 %: of 100,000 samples that is plenty, of 1,500 it is 15, hence ``minimum``.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"proxy_fraction: got {fraction}; expected a share of the samples in (0, 1], such as 0.01.")
    if minimum < 1:
        raise ValueError(f"proxy_min_samples: got {minimum}; expected at least 1.")
    count = min(len(samples), max(minimum, math.floor(fraction * len(samples) + 0.5)))
    return tuple(samples[i] for i in sorted(random.Random(seed).sample(range(len(samples)), count)))


def layer_scores(
    vlm: VisionLanguageModel,
    samples: Sequence[Sample],
    *,
    loss: Callable[[VisionLanguageModel, Batch], Tensor],
    candidates: Candidates | None = None,
    batch_size: int = 8,
    method: Literal["exact", "sketch"] = "exact",
) -> dict[str, dict[str, float]]:
    """Equals ``{tower: {linear: ||sum_b dL_b/dW||_F + ||sum_b dL_b/db||}}`` over the batches b of ``samples`` (Eq. 3).

    L_b is ``loss(vlm, batch)``, the mean cross-entropy over the batch's answer tokens (`methods.base.answer_loss`).
    Experts that are attached stay out: no gates are set. ``candidates`` is all of ``vlm.candidates`` unless given.

    Several processes share the batches and sum the gradients before the norm is taken.

    Memory: one fp32 buffer per candidate ("exact") or its sketch. Every parameter is frozen for the time of the pass:
    no weight gradient outside the candidates is ever computed, and none at all is written to a ``.grad``.

    Without an image in ``samples`` the vision tower's scores are 0.

    Raises ValueError for no samples, and for candidates that no batch calls or whose weight another module shares.
    """
    towers = vlm.candidates if candidates is None else candidates
    if not samples:
        raise ValueError("samples: got none; expected at least one sample to score the layers on.")
    if batch_size < 1:
        raise ValueError(f"proxy_batch_size: got {batch_size}; expected at least 1.")
    # A tower that no sample reaches is not called, and its gradient is zero.
    unused = () if any(sample.images for sample in samples) else (VISION,)
    linears = {
        name: _base_linear(vlm.model, name) for tower, names in towers.items() if tower not in unused for name in names
    }
    recorder = GradNormRecorder(linears, quantity="accumulated", method=method, model=vlm.model)
    with as_pretrained(vlm.model), recorder:
        number, processes = process()
        for piece in pieces_of(range(len(samples)), batch_size, process=number, processes=processes):
            batch = collate(vlm, [samples[place] for place in piece.places], with_answers=True).to(vlm.model.device)
            value = loss(vlm, batch)
            torch.autograd.backward(value if piece.counts else 0.0 * value)
        if processes > 1:
            recorder.reduce_()
        norms = recorder.norms()
    return {
        tower: {name: norms[name].weight + norms[name].bias if name in norms else 0.0 for name in names}
        for tower, names in towers.items()
    }


def _base_linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    if isinstance(module, MultiLoRALinear):
        return module.base
    if not isinstance(module, nn.Linear):
        raise ValueError(f"candidates: {name!r} is a {type(module).__name__}; expected an nn.Linear.")
    return module
