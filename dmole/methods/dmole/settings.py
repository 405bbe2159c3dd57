# SPDX-License-Identifier: Apache-2.0
"""What a configuration may set for D-MoLE and its router: frozen, checked when built.

Each default is the paper's where the paper says it (ICML 2025, arXiv 2506.11672); the comment says where it does not.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dmole.config_error import ConfigError, require

if TYPE_CHECKING:
    from dmole.data.sample import Stream

Ablation = Literal["v1", "v2", "v3", "v4"]
# Settings that are no longer D-MoLE's own.
RENAMED = {"budget_fraction": "budget.fraction", "unit": "budget.unit"}


@dataclass(frozen=True, kw_only=True)
class RouterSettings:
    """One autoencoder per task, Linear(d, hidden) ReLU Linear(hidden, d) decoder, mean squared error (Eq. 9-12)."""

    # Width of an autoencoder's hidden layer.
    hidden: int = 128
    # Passes over a task's features.
    epochs: int = 100
    # Adam's learning rate at the start.
    learning_rate: float = 1e-3
    # Cosine from learning_rate to this; equal values are the paper's constant rate. The public code: 5e-3 to 1e-3.
    final_learning_rate: float = 1e-3
    # Features in one step. The paper does not say; the public code's 1024 leaves 100 epochs of a small task too few
    # steps to converge.
    batch_size: int = 64
    # Epochs without a better training error after which training stops; 0 never stops early. The public code: 10.
    patience: int = 0
    # Output of an autoencoder. The paper's sigmoid cannot reach the negative entries of a feature; "linear" can.
    decoder: Literal["sigmoid", "linear"] = "sigmoid"
    # threshold = margin * quantile of the task's own errors; the authors: "slightly above the 95th percentile".
    quantile: float = 0.95
    # The factor in it: above 1, the threshold is above that quantile.
    margin: float = 1.1
    # Whose errors: those of the training samples (paper), or of the validation samples, which were not fitted.
    threshold_from: Literal["train", "validation"] = "train"
    # The most experts that a sample gets at test.
    top_k: int = 2
    # Batch of the forward pass that makes the features.
    feature_batch_size: int = 32

    def __post_init__(self) -> None:
        require(self.hidden >= 1, "router.hidden", self.hidden, "an integer of at least 1")
        require(self.epochs >= 1, "router.epochs", self.epochs, "an integer of at least 1")
        require(self.learning_rate > 0, "router.learning_rate", self.learning_rate, "a number above 0")
        require(
            self.final_learning_rate > 0, "router.final_learning_rate", self.final_learning_rate, "a number above 0"
        )
        require(self.batch_size >= 1, "router.batch_size", self.batch_size, "an integer of at least 1")
        require(self.patience >= 0, "router.patience", self.patience, "0 (never stop early) or more")
        require(self.decoder in ("sigmoid", "linear"), "router.decoder", self.decoder, "'sigmoid' or 'linear'")
        require(0 < self.quantile <= 1, "router.quantile", self.quantile, "a number in (0, 1]")
        require(self.margin > 0, "router.margin", self.margin, "a number above 0")
        require(
            self.threshold_from in ("train", "validation"),
            "router.threshold_from",
            self.threshold_from,
            "'train' or 'validation'",
        )
        require(self.top_k >= 1, "router.top_k", self.top_k, "an integer of at least 1")
        require(self.feature_batch_size >= 1, "router.feature_batch_size", self.feature_batch_size, "at least 1")

    def check(self, stream: Stream) -> None:
        """Raise ConfigError for a task without the samples whose errors set its threshold."""
        for task in stream.tasks:
            if self.threshold_from == "validation" and not task.validation:
                raise ConfigError(
                    f"router.threshold_from: got 'validation' and task {task.name!r} has no validation samples; "
                    f"expected some in every task. Add them or use 'train'."
                )


@dataclass(frozen=True, kw_only=True)
class DMoLESettings:
    """D-MoLE: allocator (Eq. 3-5), inter-modal curriculum (Eq. 13-15), router (Eq. 9-12)."""

    # "norm" is Eq. 13; "sum" over the layers' norms is what the public code does.
    score_aggregation: Literal["norm", "sum"] = "norm"
    # Smallest share of the budget that the vision tower gets: 0 in the paper, 0.25 in the public code.
    vision_floor: float = 0.0
    # Share of a task's training samples whose gradient scores the candidates before training.
    proxy_fraction: float = 0.01
    # But at least so many samples: 1 % of a small task is a handful, too few for a stable score.
    proxy_min_samples: int = 64
    # Samples in one of its batches.
    proxy_batch_size: int = 8
    # The full gradient of every candidate in one fp32 buffer each ("exact"), or a 64 x 64 sketch of it.
    proxy_method: Literal["exact", "sketch"] = "exact"
    # "per_sample" is Eq. 10-12. "batch_vote" is the public code's (one expert list per batch): parity only.
    # "none" keeps every expert active, in training and at test.
    routing: Literal["per_sample", "batch_vote", "none"] = "per_sample"
    # The old expert that is active, frozen, while a new one trains: each sample's nearest old task (the paper: "the old
    # task with the lowest error"), the task that the batch votes for (the public code), or none.
    training_neighbour: Literal["per_sample", "batch_vote", "none"] = "per_sample"
    # True leaves out a neighbour whose error is above its threshold, so that training meets the combinations that the
    # test meets; the paper takes the lowest error whatever its size.
    neighbour_within_threshold: bool = False
    # Ablations: experts in one tower only (v1 language, v2 vision); an even split (v3); a uniform placement (v4).
    towers: Literal["both", "vision", "language"] = "both"
    # Split the budget between the towers by their scores (Eq. 13-15); false splits it evenly.
    curriculum: bool = True
    # Place experts where the gradient is largest (Eq. 3-5), or at even distances.
    allocator: Literal["gradient", "uniform"] = "gradient"
    router: RouterSettings = field(default_factory=RouterSettings)

    def __post_init__(self) -> None:
        require(0 <= self.vision_floor < 1, "dmole.vision_floor", self.vision_floor, "a number in [0, 1)")
        require(0 < self.proxy_fraction <= 1, "dmole.proxy_fraction", self.proxy_fraction, "a number in (0, 1]")
        require(self.proxy_min_samples >= 1, "dmole.proxy_min_samples", self.proxy_min_samples, "at least 1")
        require(self.proxy_batch_size >= 1, "dmole.proxy_batch_size", self.proxy_batch_size, "an integer of at least 1")
        for name, allowed in (
            ("score_aggregation", ("norm", "sum")),
            ("proxy_method", ("exact", "sketch")),
            ("routing", ("per_sample", "batch_vote", "none")),
            ("training_neighbour", ("per_sample", "batch_vote", "none")),
            ("towers", ("both", "vision", "language")),
            ("allocator", ("gradient", "uniform")),
        ):
            value = getattr(self, name)
            require(value in allowed, f"dmole.{name}", value, "one of " + ", ".join(repr(choice) for choice in allowed))

    @classmethod
    def unknown(cls, key: str, path: str) -> ConfigError | None:
        """The error for a key that has moved; None for any other."""
        if key not in RENAMED:
            return None
        return ConfigError(f"unknown key {path!r}: it is now called {RENAMED[key]}, for every method. Rename it.")


def ablated(settings: DMoLESettings, ablation: Ablation) -> DMoLESettings:
    """The paper's ablations (section 5.3) of ``settings``; published order: full > v3 > v1, v2 > v4.

    - v1: experts in the language tower only; v2: in the vision tower only. The budget stays the same fraction, of that
      tower's candidates.
    - v3: no curriculum, the budget is split evenly between the towers.
    - v4: no allocator and no routing: experts at even distances through both towers, all of them always active.
    """
    changes: dict[str, dict[str, Any]] = {
        "v1": {"towers": "language"},
        "v2": {"towers": "vision"},
        "v3": {"curriculum": False},
        "v4": {"allocator": "uniform", "routing": "none", "training_neighbour": "none"},
    }
    if ablation not in changes:
        raise ValueError(f"ablation: got {ablation!r}; expected one of {', '.join(changes)}.")
    return dataclasses.replace(settings, **changes[ablation])
