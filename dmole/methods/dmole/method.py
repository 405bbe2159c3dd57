# SPDX-License-Identifier: Apache-2.0
"""D-MoLE: every task gets LoRA experts where its gradient asks for them; a router chooses the experts of each sample.

    y = W0 x + b + sum_{k<t} I_l^k g^k(x) s B_k A_k x + I_l^t s B_t A_t x        Eq. 2, s = alpha / r

    stage t, before training   scores of all candidates on the pretrained model (Eq. 3), budget per tower (Eq. 13-15),
                               the best linears get an expert (Eq. 4-5); each sample's nearest old task
    training                   the new expert, and frozen beside it the old expert of the nearest task
    after training             the task's autoencoder and threshold (Eq. 9); the expert freezes
    test, per sample           the best two tasks under their thresholds (Eq. 10-12); none: the base model

Source: Ge et al., "Dynamic Mixture of Curriculum LoRA Experts for Continual Multimodal Instruction Tuning", ICML 2025,
arXiv 2506.11672.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from dmole.files import JSON
from dmole.methods.base import Layers, OwnWork, RoutingRecord, Stage
from dmole.methods.budget import Sizes, check_budget
from dmole.methods.dmole.allocation import check_vision_floor
from dmole.methods.dmole.expert_pool import ExpertPool, Placement
from dmole.methods.dmole.features import FeatureStore, encoded_features, shared_features
from dmole.methods.dmole.own_work import own_work
from dmole.methods.dmole.placement import place_experts
from dmole.methods.dmole.report import method_report
from dmole.methods.dmole.routing import Router, voted
from dmole.methods.dmole.settings import DMoLESettings
from dmole.methods.dmole.skills import Skills
from dmole.methods.dmole.stage_memory import StageMemory
from dmole.methods.settings import MethodSettings
from dmole.models.adapters import (
    adapter_state,
    add_experts,
    expert_name,
    expert_parameters,
    freeze_expert,
    load_adapter_state,
    task_experts_on,
)
from dmole.models.towers import VISION
from dmole.seeding import derived_generator, derived_seed
from dmole_kernels import ExpertGates

if TYPE_CHECKING:
    from dmole.data.collate import Batch
    from dmole.data.sample import Sample, Stream, Task
    from dmole.models.vision_language import VisionLanguageModel


class DMoLE(Skills):
    """D-MoLE as published; the ablations are settings (`dmole.methods.dmole.settings.ablated`)."""

    name: ClassVar[str] = "dmole"
    Options: ClassVar[type[Any]] = DMoLESettings
    routed_by = "router"

    def __init__(self, vlm: VisionLanguageModel, settings: MethodSettings, *, seed: int) -> None:
        super().__init__(vlm, settings, seed=seed)
        self.options = settings.options_as(DMoLESettings)
        if self.options.towers != "both":
            self.candidates = {self.options.towers: self.candidates[self.options.towers]}
        self.budget = self._checked_budget()
        self.gates = {tower: ExpertGates() for tower in self.candidates}
        self.adapters = self.attached(self.gates)
        self.pool = ExpertPool()
        self.router = Router(self.options.router)
        self._features = FeatureStore(vlm, batch_size=self.options.router.feature_batch_size)
        self._stage: StageMemory | None = None
        self.profile.seconds = {"proxy_seconds": 0.0, "router_seconds": 0.0}

    def _checked_budget(self) -> int:
        unit, budget = self.settings.budget.unit, self.settings.budget.of(self.candidates)
        check_budget(self.candidates, budget=budget, unit=unit)
        check_vision_floor(self.candidates, budget=budget, unit=unit, vision_floor=self.options.vision_floor)
        return budget

    @classmethod
    def trained_weights(cls, settings: MethodSettings, sizes: Sizes) -> int:
        """The budget times the mean linear of the towers: which linears a task gets is decided by its data."""
        towers = settings.options_as(DMoLESettings).towers
        used = {tower: linears for tower, linears in sizes.items() if towers in ("both", tower)}
        return round(settings.budget.weights(settings.lora.rank, used))

    def check(self, stream: Stream) -> None:
        self._checked_budget()
        if self.options.routing != "none":
            self.options.router.check(stream)

    # Before training

    @classmethod
    def own_work(cls, settings: MethodSettings, stages: Sequence[Stage], stream: Stream, layers: Layers) -> OwnWork:
        return own_work(settings.options_as(DMoLESettings), stages, stream, layers)

    def begin_stage(self, stage: int, task: Task) -> None:
        if self._stage is not None:
            raise ValueError(f"stage: got {stage} while another one is open; expected end_stage first.")
        with self.profile.part("proxy_seconds"):
            placement = place_experts(
                self.vlm,
                task,
                self.candidates,
                name=expert_name(len(self.pool) + 1, task.name),
                settings=self.settings,
                seed=derived_seed(self.seed, "proxy", stage),
            )
        if self.options.routing != "none":
            with self.profile.part("router_seconds"):
                placement = self._open_stage(task, placement)
        self.pool.add(placement)
        add_experts(
            self.adapters,
            placement.all_linears,
            placement.expert,
            rank=placement.rank,
            alpha=placement.alpha,
            generator=derived_generator(self.seed, "expert", stage),
        )

    def _open_stage(self, task: Task, placement: Placement) -> Placement:
        """The task's features, and who is nearest to each of its samples; returns the placement with their counts."""
        features_ND = self._fresh_features(task.train)
        neighbour_N = self._neighbours(features_ND)
        self._stage = StageMemory(
            ids=tuple(sample.id for sample in task.train), features_ND=features_ND, neighbour_N=neighbour_N
        )
        return dataclasses.replace(placement, neighbours=self._stage.counts(self.router.tasks))

    def _fresh_features(self, samples: Sequence[Sample]) -> Tensor:
        # Not through the store: each set is asked for once.
        return shared_features(self.vlm, samples, batch_size=self.options.router.feature_batch_size)

    # Training

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in expert_parameters(self.adapters).items() if p.requires_grad}

    def training_gates(self, batch: Batch) -> AbstractContextManager[None]:
        if not len(self.pool):
            raise ValueError("training_gates: got a batch before begin_stage; expected begin_stage first.")
        ids = [sample.id for sample in batch.samples]
        return self._learning(None if self._stage is None else self._stage.neighbours(ids), batch)

    def validation_gates(self, batch: Batch) -> AbstractContextManager[None]:
        if self._stage is None:
            return self.training_gates(batch)
        return self._learning(self._neighbours(self._features.features(batch.samples)), batch)

    def _neighbours(self, features_ND: Tensor) -> Tensor:
        """The old task whose expert is active beside the new one, for each sample: [N] int64, -1 for none."""
        mode = self.options.training_neighbour
        if mode == "none":
            return torch.full((len(features_ND),), -1, dtype=torch.int64, device="cpu")
        within = self.options.neighbour_within_threshold or mode == "batch_vote"
        return self.router.nearest(features_ND, within_threshold=within)

    def _learning(self, neighbour_S: Tensor | None, batch: Batch) -> AbstractContextManager[None]:
        """The new expert for everyone, and each sample's neighbour; every expert where there is no router."""
        samples = len(batch.samples)
        if neighbour_S is None:
            return self.task_gates(batch, [self.pool.tasks] * samples)
        if self.options.training_neighbour == "batch_vote":
            neighbour_S = voted(neighbour_S)
        # The router lacks the task that is trained, and tasks that were taken out of the routing.
        old, new = self.router.tasks, self.pool.tasks[-1]
        places = neighbour_S.tolist()
        return self.task_gates(batch, [(new,) if place < 0 else (old[place], new) for place in places])

    # After training

    def end_stage(self, stage: int, task: Task) -> None:
        if self._stage is not None:
            with self.profile.part("router_seconds"):
                held_out = self.options.router.threshold_from == "validation"
                self.router.add_task(
                    task.name,
                    self._stage.features_ND,
                    generator=derived_generator(self.seed, "autoencoder", stage),
                    calibration_ND=self._fresh_features(task.validation) if held_out else None,
                )
            self._stage = None
        freeze_expert(self.adapters, self.pool[task.name].expert)

    # Test

    @contextlib.contextmanager
    def evaluation_gates(self, batch: Batch) -> Iterator[RoutingRecord | None]:
        record = self.routes(batch)
        chosen = [self.pool.tasks] * len(batch.samples) if record is None else record.chosen
        with self.task_gates(batch, chosen):
            yield record

    def routes(self, batch: Batch) -> RoutingRecord | None:
        if self.options.routing == "none":
            return None
        with self.profile.part("router_seconds"):
            routes = self.router.select(self._test_features(batch), mode=self.options.routing)
        return RoutingRecord(chosen=routes.chosen, errors_NT=routes.error_NT, thresholds=self.router.thresholds)

    def _test_features(self, batch: Batch) -> Tensor:
        if not self.serving:
            return self._features.features(batch.samples)
        encoded = batch.encoded if VISION in self.vlm.towers else None
        return encoded_features(self.vlm, encoded, [sample.instruction for sample in batch.samples])

    def task_gates(self, batch: Batch, tasks: Sequence[Sequence[str]]) -> AbstractContextManager[None]:
        for name in {name for names in tasks for name in names}:
            self.pool[name]  # refuses a task without experts
        return task_experts_on(self.gates, self.task_experts(), tasks, units=batch.units)

    # Resume and report

    def state(self) -> tuple[dict[str, Tensor], dict[str, JSON]]:
        tensors, adapters = adapter_state(self.adapters)
        tensors = {f"adapters.{name}": tensor for name, tensor in tensors.items()}
        router_tensors, router = self.router.state()
        tensors |= {f"router.{name}": tensor for name, tensor in router_tensors.items()}
        stage = None
        if self._stage is not None:
            memory, stage = self._stage.state()
            tensors |= {f"stage.{name}": tensor for name, tensor in memory.items()}
        return tensors, {"adapters": adapters, "pool": self.pool.to_json(), "router": router, "stage": stage}

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, JSON]) -> None:
        load_adapter_state(self.adapters, _under(tensors, "adapters."), meta["adapters"])
        self.pool = ExpertPool.from_json(meta["pool"])
        self.router.load_state(_under(tensors, "router."), meta["router"])
        stage = meta["stage"]
        self._stage = StageMemory.from_state(_under(tensors, "stage."), stage) if stage else None

    def report(self) -> dict[str, JSON]:
        unit = self.settings.budget.unit
        return method_report(
            self.candidates, self.budget, unit, pool=self.pool, router=self.router, adapters=self.adapters
        )


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
