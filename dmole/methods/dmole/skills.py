# SPDX-License-Identifier: Apache-2.0
"""What can be done with the tasks that D-MoLE has learned: forget one, go back to the first ones, adopt an expert.

An expert never changes after its task, and a task's autoencoder reads no other one. So the model after the first t
tasks is the model of today without the others, and an expert from elsewhere is one more of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dmole.data.sample import Stream
from dmole.methods.base import Method
from dmole.methods.dmole.expert_pool import ExpertPool, Placement
from dmole.methods.dmole.features import shared_features
from dmole.methods.dmole.routing import Router
from dmole.methods.dmole.settings import DMoLESettings
from dmole.models.adapters import Adapters, expert_name, remove_expert
from dmole.seeding import derived_generator
from dmole_kernels import load_experts

if TYPE_CHECKING:
    from dmole.data.sample import Task


class Skills(Method):
    """The part of D-MoLE that works on learned tasks; the part that learns them is `DMoLE`."""

    options: DMoLESettings
    adapters: Adapters
    pool: ExpertPool
    router: Router

    def task_experts(self) -> dict[str, str]:
        return {placement.task: placement.expert for placement in self.pool}

    def trained_beside(self) -> dict[str, dict[str, int]]:
        return {p.task: {task: count for task, count in p.neighbours.items() if task} for p in self.pool}

    def forget(self, task: str, *, keep_weights: bool = False) -> None:
        placement = self.pool[task]
        if task in self.router.tasks:
            self.router.remove_task(task)
        if not keep_weights:
            self.pool.remove(task)
            remove_expert(self.adapters, placement.expert)

    @contextlib.contextmanager
    def as_of(self, tasks: Sequence[str]) -> Iterator[None]:
        pool, router = self.pool, self.router
        earlier = ExpertPool()
        for placement in pool:
            if placement.task in tasks:
                earlier.add(placement)
        self.pool, self.router = earlier, Router(self.options.router)
        self.router.load_state(*router.state())
        for task in set(router.tasks).difference(tasks):
            self.router.remove_task(task)
        try:
            yield
        finally:
            self.pool, self.router = pool, router

    def adopt(self, task: Task, lora: Path) -> None:
        if self.options.routing == "none":
            raise ValueError(
                "dmole.routing: got 'none', where every sample uses every expert, so that an imported one would change "
                "all answers; expected a routed model. Train it with dmole.routing=per_sample."
            )
        settings = self.options.router
        settings.check(Stream(name=task.name, tasks=(task,)))
        expert = self._new_expert_name(task.name)
        load_experts(self.vlm.model, [lora], [expert])
        held = {name: layer.bank for name, layer in self.adapters.items() if expert in layer.bank}
        ranks = {name: bank.rank(expert) for name, bank in held.items()}
        largest = max(ranks, key=ranks.__getitem__)
        linears = {
            tower: tuple(name for name in names if name in held) for tower, names in self.candidates.items()
        }  # fmt: skip
        held_out = task.validation if settings.threshold_from == "validation" else task.train
        train_ND, held_out_ND = (
            shared_features(self.vlm, samples, batch_size=settings.feature_batch_size)
            for samples in (task.train, held_out)
        )
        generator = derived_generator(self.seed, "imported autoencoder", expert)
        self.router.add_task(task.name, train_ND, generator=generator, calibration_ND=held_out_ND)
        self.pool.add(
            Placement(
                task=task.name,
                expert=expert,
                rank=ranks[largest],
                alpha=float(held[largest].expert(expert).alpha),
                linears=linears,
                budgets={tower: len(names) for tower, names in linears.items()},
            )
        )

    def _new_expert_name(self, task: str) -> str:
        position = len(self.pool) + 1
        while any(expert.startswith(f"t{position:02d}_") for expert in self.pool.experts):
            position += 1  # after a task was forgotten
        return expert_name(position, task)
