# SPDX-License-Identifier: Apache-2.0
"""D-MoLE: every task gets LoRA experts where its gradient asks for them, and a router decides at test whose serve.

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
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from dmole.files import JSON
from dmole.methods.base import Method, RoutingRecord, Sizes, answer_loss
from dmole.methods.dmole.allocation import (
    allocate,
    allocate_uniformly,
    capacities,
    check_budget,
    layer_scores,
    proxy_subset,
    total_budget,
)
from dmole.methods.dmole.curriculum import even_split, module_scores, proportional_split, split_budget, update_ratios
from dmole.methods.dmole.expert_pool import ExpertPool, Placement, expert_name
from dmole.methods.dmole.routing import FeatureStore, Router, router_features
from dmole.methods.dmole.settings import DMoLESettings
from dmole.methods.settings import MethodSettings
from dmole.models.adapters import (
    adapter_state,
    add_experts,
    attach,
    expert_parameters,
    experts_on,
    freeze_expert,
    load_adapter_state,
)
from dmole.seeding import derived_generator, derived_seed
from dmole.training.processes import process, shared
from dmole_kernels import ExpertGates

if TYPE_CHECKING:
    from dmole.data.collate import Batch
    from dmole.data.sample import Sample, Stream, Task
    from dmole.models.vision_language import VisionLanguageModel


@dataclass(frozen=True, kw_only=True)
class _StageMemory:
    """The running stage's training samples: z, and the index of the nearest old task (-1: none)."""

    ids: tuple[str, ...]
    features_ND: Tensor
    neighbour_N: Tensor
    row: Mapping[str, int]

    @classmethod
    def of(cls, ids: Sequence[str], features_ND: Tensor, neighbour_N: Tensor) -> _StageMemory:
        row = {sample: i for i, sample in enumerate(ids)}
        return cls(ids=tuple(ids), features_ND=features_ND, neighbour_N=neighbour_N, row=row)


class DMoLE(Method):
    """D-MoLE as published; the ablations are settings (`dmole.methods.dmole.settings.ablated`)."""

    name: ClassVar[str] = "dmole"
    Options: ClassVar[type[Any]] = DMoLESettings

    def __init__(self, vlm: VisionLanguageModel, settings: MethodSettings, *, seed: int) -> None:
        super().__init__(vlm, settings, seed=seed)
        self.options = settings.options_as(DMoLESettings)
        if self.options.towers != "both":
            self.candidates = {self.options.towers: self.candidates[self.options.towers]}
        self.budget = self._checked_budget()
        self.gates = {tower: ExpertGates() for tower in self.candidates}
        self.adapters = attach(
            vlm.model,
            self.candidates,
            gates=self.gates,
            dropout=settings.lora.dropout,
            dropout_mode=settings.lora.dropout_mode,
            rows=vlm.rows,
        )
        self.pool = ExpertPool()
        self.router = Router(self.options.router)
        self._features = FeatureStore(vlm, batch_size=self.options.router.feature_batch_size)
        self._stage: _StageMemory | None = None
        self.profile.seconds = {"proxy_seconds": 0.0, "router_seconds": 0.0}

    @property
    def _routed(self) -> bool:
        return self.options.routing != "none"

    def _checked_budget(self) -> int:
        unit = self.options.unit
        budget = total_budget(self.candidates, fraction=self.options.budget_fraction, unit=unit)
        check_budget(self.candidates, budget=budget, unit=unit, vision_floor=self.options.vision_floor)
        return budget

    @classmethod
    def trained_weights(cls, settings: MethodSettings, sizes: Sizes) -> int:
        """The budget times the mean linear of the towers: which linears a task gets is decided by its data."""
        options = settings.options_as(DMoLESettings)
        used = {tower: linears for tower, linears in sizes.items() if options.towers in ("both", tower)}
        names = {tower: tuple(linears) for tower, linears in used.items()}
        budget = total_budget(names, fraction=options.budget_fraction, unit=options.unit)
        share = budget / sum(capacities(names, options.unit).values())
        return round(settings.lora.rank * share * sum(sum(linears.values()) for linears in used.values()))

    def check(self, stream: Stream) -> None:
        self._checked_budget()
        for task in stream.tasks:
            if self._routed and self.options.router.threshold_from == "validation" and not task.validation:
                raise ValueError(
                    f"router.threshold_from: got 'validation' and task {task.name!r} has no validation samples; "
                    f"expected some in every task. Add them or use 'train'."
                )

    # Before training

    def begin_stage(self, stage: int, task: Task) -> None:
        if self._stage is not None:
            raise ValueError(f"stage: got {stage} while another one is open; expected end_stage first.")
        with self.profile.part("proxy_seconds"):
            placement = self._place(stage, task)
        if self._routed:
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

    def _place(self, stage: int, task: Task) -> Placement:
        """Scores, budgets and linears of a new task (Eq. 3-5, 13-15)."""
        options = self.options
        room = capacities(self.candidates, options.unit)
        scores: dict[str, dict[str, float]] = {}
        towers: dict[str, float] = {}
        if options.allocator == "uniform":
            budgets = proportional_split(room, self.budget)
            linears = allocate_uniformly(self.candidates, budgets, unit=options.unit)
        else:
            subset = proxy_subset(
                task.train,
                fraction=options.proxy_fraction,
                minimum=options.proxy_min_samples,
                seed=derived_seed(self.seed, "proxy", stage),
            )
            scores = layer_scores(
                self.vlm,
                subset,
                loss=answer_loss,
                candidates=self.candidates,
                batch_size=options.proxy_batch_size,
                method=options.proxy_method,
            )
            towers = module_scores(scores, aggregation=options.score_aggregation)
            if options.curriculum:
                ratios = update_ratios(towers)
                budgets = split_budget(ratios, room, self.budget, vision_floor=options.vision_floor)
            else:
                budgets = even_split(room, self.budget)
            linears = allocate(scores, budgets, unit=options.unit)
        return Placement(
            task=task.name,
            expert=expert_name(len(self.pool) + 1, task.name),
            rank=self.settings.lora.rank,
            alpha=self.settings.lora.alpha,
            linears=linears,
            budgets=budgets,
            module_scores=towers,
            scores=scores,
        )

    def _open_stage(self, task: Task, placement: Placement) -> Placement:
        """The task's features, and who is nearest to each of its samples; returns the placement with their counts."""
        features_ND = self._fresh_features(task.train)
        neighbour_N = self._neighbours(features_ND)
        self._stage = _StageMemory.of([sample.id for sample in task.train], features_ND, neighbour_N)
        names = Counter(self.router.tasks[i] if i >= 0 else "" for i in neighbour_N.tolist())
        return dataclasses.replace(placement, neighbours=dict(sorted(names.items())))

    def _fresh_features(self, samples: Sequence[Sample]) -> Tensor:
        # Not through the store: each set is asked for once. The batches are those of one process, however many share
        # them, because a batch decides the last bits of a feature.
        size = self.options.router.feature_batch_size
        if process()[1] == 1:
            return router_features(self.vlm, samples, batch_size=size)

        def batch(place: int) -> Tensor:
            chunk = samples[place * size : (place + 1) * size]
            return router_features(self.vlm, chunk, batch_size=size).cpu()

        chunks = shared(math.ceil(len(samples) / size), batch)
        return torch.cat(chunks).to(self.vlm.model.device) if chunks else torch.empty(0, 0, device="cpu")

    # Training

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in expert_parameters(self.adapters).items() if p.requires_grad}

    def training_gates(self, batch: Batch) -> AbstractContextManager[None]:
        if not len(self.pool):
            raise ValueError("training_gates: got a batch before begin_stage; expected begin_stage first.")
        neighbour_S = None if self._stage is None else self._stage.neighbour_N[self._rows(batch)]
        return self._learning(neighbour_S, batch)

    def validation_gates(self, batch: Batch) -> AbstractContextManager[None]:
        if self._stage is None:
            return self.training_gates(batch)
        if self.options.training_neighbour == "per_task":
            neighbour_S = self._stage.neighbour_N[:1].expand(len(batch.samples))
        else:
            neighbour_S = self._neighbours(self._features.features(batch.samples))
        return self._learning(neighbour_S, batch)

    def _neighbours(self, features_ND: Tensor) -> Tensor:
        """The old task whose expert is active beside the new one, for each sample: [N] int64, -1 for none."""
        mode = self.options.training_neighbour
        if mode == "none":
            return torch.full((len(features_ND),), -1, dtype=torch.int64, device="cpu")
        within = self.options.neighbour_within_threshold
        return self.router.nearest(features_ND, mode=mode, within_threshold=within)

    def _learning(self, neighbour_S: Tensor | None, batch: Batch) -> AbstractContextManager[None]:
        """The new expert for everyone, and each sample's neighbour; every expert where there is no router."""
        experts, samples = tuple(placement.expert for placement in self.pool), len(batch.samples)
        if neighbour_S is None:
            gate_SE = torch.ones(samples, len(experts), device="cpu")
        else:
            # Column k is 1 where old task k is the sample's neighbour; the last one is the new expert.
            old_SE = neighbour_S[:, None] == torch.arange(len(experts) - 1, device="cpu")
            gate_SE = torch.cat([old_SE.float(), torch.ones(samples, 1, device="cpu")], dim=1)
        return experts_on(self.gates, gate_SE, experts, units=batch.units)

    def _rows(self, batch: Batch) -> Tensor:
        assert self._stage is not None
        row = self._stage.row
        unknown = [sample.id for sample in batch.samples if sample.id not in row]
        if unknown:
            raise ValueError(
                f"batch: got samples {unknown[:3]} that are not in this stage's training data; expected samples of "
                f"{self.pool.tasks[-1]!r}. Call begin_stage with the task that is trained."
            )
        return torch.tensor([row[sample.id] for sample in batch.samples], device="cpu")

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

    def evaluation_gates(self, batch: Batch) -> AbstractContextManager[RoutingRecord | None]:
        return self._evaluating(batch)

    @contextlib.contextmanager
    def _evaluating(self, batch: Batch) -> Iterator[RoutingRecord | None]:
        experts = tuple(placement.expert for placement in self.pool)
        if self.options.routing == "none":
            gate_SE = torch.ones(len(batch.samples), len(experts), device="cpu")
            with experts_on(self.gates, gate_SE, experts, units=batch.units):
                yield None
            return
        with self.profile.part("router_seconds"):
            features_ND = self._features.features(batch.samples)
            routes = self.router.select(features_ND, mode=self.options.routing)
        # During a stage the pool is one task ahead of the router, which is trained at its end.
        with experts_on(self.gates, routes.gate_NT, experts[: len(self.router.tasks)], units=batch.units):
            yield RoutingRecord(chosen=routes.chosen)

    # Resume and report

    def state(self) -> tuple[dict[str, Tensor], dict[str, JSON]]:
        tensors, adapters = adapter_state(self.adapters)
        tensors = {f"adapters.{name}": tensor for name, tensor in tensors.items()}
        router_tensors, router = self.router.state()
        tensors |= {f"router.{name}": tensor for name, tensor in router_tensors.items()}
        stage = None
        if self._stage is not None:
            # The features go along: made again in other batches they would differ in the last bit, and an autoencoder
            # trained on them in more than that.
            tensors["stage.features_ND"] = self._stage.features_ND.clone()
            tensors["stage.neighbour_N"] = self._stage.neighbour_N.clone()
            stage = {"ids": list(self._stage.ids)}
        return tensors, {"adapters": adapters, "pool": self.pool.to_json(), "router": router, "stage": stage}

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, JSON]) -> None:
        load_adapter_state(self.adapters, _under(tensors, "adapters."), meta["adapters"])
        self.pool = ExpertPool.from_json(meta["pool"])
        self.router.load_state(_under(tensors, "router."), meta["router"])
        stage, memory = meta["stage"], _under(tensors, "stage.")
        self._stage = None
        if stage:
            # Cloned into torch's aligned memory: the bits of a product may depend on where its operands lie.
            self._stage = _StageMemory.of(stage["ids"], memory["features_ND"].clone(), memory["neighbour_N"].clone())

    def report(self) -> dict[str, JSON]:
        counts = {
            placement.task: sum(p.numel() for p in expert_parameters(self.adapters, placement.expert).values())
            for placement in self.pool
        }
        return {
            "budget": self.budget,
            "budget_unit": self.options.unit,
            "candidates": {tower: len(names) for tower, names in self.candidates.items()},
            "experts": self.pool.to_json(),
            "expert_parameters": counts,
            "router": {
                "thresholds": self.router.thresholds,
                "first_and_last_training_error": {k: list(v) for k, v in self.router.training_errors.items()},
            },
        }


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
