# SPDX-License-Identifier: Apache-2.0
"""The register of experts: ``I_l^t`` of Eq. 2, which task has an expert at which linear, and why.

Plain data, JSON in and out. The weights are in the model's `ExpertBank`s, under the name that `Placement.expert` says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One task's experts. ``linears``, ``budgets``, ``module_scores`` and ``scores`` are per tower."""

    task: str
    expert: str
    rank: int
    alpha: float
    linears: Mapping[str, tuple[str, ...]]
    budgets: Mapping[str, int]
    module_scores: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    # How many training samples had each old task as their neighbour; "" counts those that had none.
    neighbours: Mapping[str, int] = field(default_factory=dict)

    @property
    def all_linears(self) -> tuple[str, ...]:
        """The linears of all towers."""
        return tuple(name for names in self.linears.values() for name in names)


def expert_name(position: int, task: str) -> str:
    """A name that a module may have ("." may not be in it): ``expert_name(3, "VQA 2.0") == "t03_VQA_2_0"``."""
    return f"t{position:02d}_" + re.sub(r"[^0-9A-Za-z_]", "_", task)


class ExpertPool:
    """Placements in the order in which the tasks were met."""

    def __init__(self) -> None:
        self._placements: dict[str, Placement] = {}

    def __len__(self) -> int:
        return len(self._placements)

    def __iter__(self) -> Iterator[Placement]:
        return iter(self._placements.values())

    def __contains__(self, task: object) -> bool:
        return task in self._placements

    def __getitem__(self, task: str) -> Placement:
        if task not in self._placements:
            raise ValueError(f"task: got {task!r}, which has no expert; expected one of {self.tasks}.")
        return self._placements[task]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that have experts, oldest first."""
        return tuple(self._placements)

    def add(self, placement: Placement) -> None:
        """Registers a task's experts; its task and its expert name must be new."""
        if placement.task in self._placements:
            raise ValueError(f"task: got {placement.task!r}, which has experts already; expected a new task.")
        if any(placement.expert == other.expert for other in self):
            raise ValueError(f"expert: got {placement.expert!r}, which is taken; expected a new name.")
        self._placements[placement.task] = placement

    def remove(self, task: str) -> Placement:
        """Forgets a task's experts and returns what was known of them."""
        placement = self[task]
        del self._placements[task]
        return placement

    def to_json(self) -> list[dict[str, Any]]:
        """Everything, as JSON takes it."""
        return [
            {**asdict(placement), "linears": {tower: list(names) for tower, names in placement.linears.items()}}
            for placement in self
        ]

    @classmethod
    def from_json(cls, plain: list[dict[str, Any]]) -> ExpertPool:
        """The pool that `to_json` wrote."""
        pool = cls()
        for entry in plain:
            pool.add(Placement(**{**entry, "linears": {t: tuple(names) for t, names in entry["linears"].items()}}))
        return pool
