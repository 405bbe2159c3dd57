# SPDX-License-Identifier: Apache-2.0
"""What a `GrownModel` gives back: answers with their routes, and its experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from dmole.methods.base import RoutingRecord


@dataclass(frozen=True, kw_only=True)
class Route:
    """Which tasks' experts a sample uses, best first, and why.

    Attributes:
        tasks: () means the base model alone.
        errors: by task, how far the sample is from it (D-MoLE, Eq. 9); {} where nothing was measured.
        thresholds: by task, the largest error that still fits (Eq. 10).
    """

    tasks: tuple[str, ...]
    errors: Mapping[str, float] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)

    @property
    def unknown(self) -> bool:
        """Whether the router looked at the sample and no task fits."""
        return bool(self.errors) and not self.tasks

    def __str__(self) -> str:
        if not self.errors:
            return " + ".join(self.tasks) or "the same experts for every sample"
        near = sorted(self.errors, key=lambda task: self.errors[task] / self.thresholds[task])
        shown = ", ".join(f"{task} {self.errors[task]:.2g} of {self.thresholds[task]:.2g}" for task in near[:3])
        return f"{' + '.join(self.tasks) or 'unknown: the base model alone'} (error of threshold: {shown})"


@dataclass(frozen=True, kw_only=True)
class GrownAnswer:
    """An answer. `cut`: generation stopped at `max_new_tokens`, not at an end token."""

    text: str
    cut: bool
    route: Route
    prompt_tokens: int


@dataclass(frozen=True, kw_only=True)
class ExpertInfo:
    """One expert as it is in the model.

    Attributes:
        linears: where it is, by qualified name, with its rank there.
        parameters, bytes: of its weights.
        resident: whether it is in memory; an expert that is not is read again when a sample needs it.
        uses: how many samples of this process have used it.
        share: `uses` over all samples that were answered; the load of the expert.
    """

    name: str
    task: str | None
    linears: Mapping[str, int]
    parameters: int
    bytes: int
    resident: bool
    uses: int
    share: float


def routes_of(record: RoutingRecord | None, count: int) -> list[Route]:
    if record is None:
        return [Route(tasks=())] * count
    if record.errors_NT is None:
        return [Route(tasks=tasks) for tasks in record.chosen]
    names = tuple(record.thresholds)
    return [
        Route(tasks=tasks, errors=dict(zip(names, errors, strict=True)), thresholds=record.thresholds)
        for tasks, errors in zip(record.chosen, record.errors_NT.tolist(), strict=True)
    ]


def expert_sizes(model: nn.Module) -> dict[str, tuple[dict[str, int], int, int]]:
    """By expert: its rank at each linear, its parameters and its bytes."""
    ranks: dict[str, dict[str, int]] = {}
    parameters: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        linear, inside, rest = name.partition(".bank.experts.")
        if inside:
            expert, _, matrix = rest.partition(".")
            if matrix == "lora_a":
                ranks.setdefault(expert, {})[linear] = len(parameter)
            parameters[expert] += parameter.numel()
            sizes[expert] += parameter.numel() * parameter.element_size()
    return {expert: (linears, parameters[expert], sizes[expert]) for expert, linears in ranks.items()}
