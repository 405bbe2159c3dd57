# SPDX-License-Identifier: Apache-2.0
"""Which old tasks a sample resembles: one autoencoder per task, ``error_t(z) = mean((AE_t(z) - z) ** 2)``.

    z         = normalise([max over tokens of the vision tower ; max over tokens of the LLM on the instruction])
    AE_t(z)   = decoder(W2 relu(W1 z + b1) + b2)                      Eq. 9
    keep        the tasks t with error_t <= tau_t                     Eq. 10
    rank        by error, lowest first                                Eq. 11
    activate    the best two; none kept means the base model          Eq. 12
    tau_t     = margin * quantile of task t's own errors

z depends on the frozen pretrained model alone (all experts off), so it is computed once and kept. Pooling respects the
padding mask: a sample's batch mates change no more of its feature than the last bits, which float sums in another order
do (2.4e-7 on the mini model; each sample alone would be equal to the bit and takes five times as long).

Legend: N samples, D feature width, H hidden width, T tasks. Source: D-MoLE, ICML 2025, arXiv 2506.11672, Eq. 9-12. The
authors' public code never computes tau; "slightly above the 95th percentile" is their answer to reviewers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dmole.methods.dmole.settings import RouterSettings
from dmole_kernels import router_score, router_select

if TYPE_CHECKING:
    pass

# The public code lets in an expert at test beside the first, or any old one in training, with this share of the votes.
VOTE_SHARE = 0.3


def voted(neighbour_S: Tensor) -> Tensor:
    """The public code's rule in training: every sample gets the batch's most frequent neighbour, if it has at least
    30 % of the samples that have one; else none (-1)."""
    votes = neighbour_S[neighbour_S >= 0]
    if not len(votes):
        return neighbour_S
    counts = votes.bincount()
    winner = int(counts.argmax())
    elected = winner if int(counts[winner]) >= VOTE_SHARE * len(votes) else -1
    return torch.full_like(neighbour_S, elected)


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """Weights of ``AE(z) = decoder(W2 relu(W1 z + b1) + b2)``; encoder [H, D], [H]; decoder [D, H], [D]."""

    encoder_weight_HD: Tensor
    encoder_bias_H: Tensor
    decoder_weight_DH: Tensor
    decoder_bias_D: Tensor


def train_autoencoder(
    features_ND: Tensor, settings: RouterSettings, *, generator: torch.Generator
) -> tuple[Autoencoder, list[float]]:
    """Adam on the mean squared error (Eq. 9); returns the weights and the mean error of every epoch run.

    Initial weights and the order of the samples come from ``generator`` (on the CPU) alone.
    """
    if features_ND.ndim != 2 or len(features_ND) == 0:
        raise ValueError(f"features: got {tuple(features_ND.shape)}; expected [N, D] with at least one sample.")
    n, width = features_ND.shape
    device = features_ND.device

    def uniform(*shape: int, fan_in: int) -> Tensor:
        # What nn.Linear draws, from our generator.
        bound = 1.0 / math.sqrt(fan_in)
        return (
            torch.empty(*shape, device="cpu")
            .uniform_(-bound, bound, generator=generator)
            .to(device)
            .requires_grad_(True)
        )

    w1, b1 = uniform(settings.hidden, width, fan_in=width), uniform(settings.hidden, fan_in=width)
    w2, b2 = uniform(width, settings.hidden, fan_in=settings.hidden), uniform(width, fan_in=settings.hidden)
    optimizer = torch.optim.Adam([w1, b1, w2, b2], lr=settings.learning_rate, fused=True)
    losses: list[float] = []
    best, stale = math.inf, 0
    for epoch in range(settings.epochs):
        cosine = 0.5 * (1.0 + math.cos(math.pi * epoch / settings.epochs))
        rate = settings.final_learning_rate + (settings.learning_rate - settings.final_learning_rate) * cosine
        for group in optimizer.param_groups:
            group["lr"] = rate
        order = torch.randperm(n, generator=generator, device="cpu").to(device)
        summed = torch.zeros((), device=device)  # read once an epoch: a step must not wait for the device
        for start in range(0, n, settings.batch_size):
            z_BD = features_ND[order[start : start + settings.batch_size]]
            output_BD = F.linear(F.relu(F.linear(z_BD, w1, b1)), w2, b2)
            if settings.decoder == "sigmoid":
                output_BD = output_BD.sigmoid()
            loss = F.mse_loss(output_BD, z_BD)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            summed += loss.detach() * len(z_BD)
        losses.append(float(summed) / n)
        best, stale = (losses[-1], 0) if losses[-1] < best else (best, stale + 1)
        if settings.patience and stale >= settings.patience:
            break
    return (
        Autoencoder(
            encoder_weight_HD=w1.detach(),
            encoder_bias_H=b1.detach(),
            decoder_weight_DH=w2.detach(),
            decoder_bias_D=b2.detach(),
        ),
        losses,
    )


@dataclass(frozen=True, kw_only=True)
class Routes:
    """Who serves each sample: ``gate_NT`` is 0 or 1, ``chosen[n]`` the tasks, lowest error first; () = base model."""

    gate_NT: Tensor
    chosen: tuple[tuple[str, ...], ...]
    error_NT: Tensor


class Router:
    """The autoencoders and thresholds of the tasks learned so far, in the order they were learned."""

    def __init__(self, settings: RouterSettings) -> None:
        self.settings = settings
        self.tasks: tuple[str, ...] = ()
        self.training_errors: dict[str, tuple[float, float]] = {}  # first and last epoch
        self._weights: dict[str, Tensor] = {}  # stacked over tasks: the arguments of router_score
        self._thresholds_T = torch.empty(0, device="cpu")

    @property
    def thresholds(self) -> dict[str, float]:
        """tau per task."""
        return dict(zip(self.tasks, self._thresholds_T.tolist(), strict=True))

    def add_task(
        self, task: str, features_ND: Tensor, *, generator: torch.Generator, calibration_ND: Tensor | None = None
    ) -> float:
        """Trains the task's autoencoder; returns its threshold, ``margin * quantile(errors)``.

        Args:
            features_ND: z of the task's training samples.
            calibration_ND: z of the samples whose errors set the threshold; the training samples unless given.
        """
        if task in self.tasks:
            raise ValueError(f"task: got {task!r}, which the router has; expected a new one of {self.tasks}.")
        autoencoder, losses = train_autoencoder(features_ND, self.settings, generator=generator)
        fresh = {
            "encoder_weight_THD": autoencoder.encoder_weight_HD[None],
            "encoder_bias_TH": autoencoder.encoder_bias_H[None],
            "decoder_weight_TDH": autoencoder.decoder_weight_DH[None],
            "decoder_bias_TD": autoencoder.decoder_bias_D[None],
        }
        errors_N1 = self._score(features_ND if calibration_ND is None else calibration_ND, fresh)
        threshold_1 = errors_N1.quantile(self.settings.quantile, dim=0) * self.settings.margin
        self._weights = {k: torch.cat([self._weights[k], v]) if self._weights else v for k, v in fresh.items()}
        self._thresholds_T = torch.cat([self._thresholds_T.to(threshold_1), threshold_1])
        self.tasks = (*self.tasks, task)
        self.training_errors[task] = (losses[0], losses[-1])
        return float(threshold_1)

    def errors(self, features_ND: Tensor) -> Tensor:
        """error_NT: every sample's reconstruction error under every task's autoencoder."""
        if not self.tasks:
            return features_ND.new_zeros(len(features_ND), 0)
        return self._score(features_ND, self._weights)

    def _score(self, features_ND: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return router_score(
                features_ND,
                weights["encoder_weight_THD"],
                weights["encoder_bias_TH"],
                weights["decoder_weight_TDH"],
                weights["decoder_bias_TD"],
                decoder=self.settings.decoder,
            )

    def select(self, features_ND: Tensor, *, mode: Literal["per_sample", "batch_vote"] = "per_sample") -> Routes:
        """The experts of each sample at test (Eq. 10-12).

        "batch_vote" is the public code's rule, for parity only: each sample votes for its best task (none under its
        threshold: no vote); the whole batch gets the winner, and the runner-up if it has at least 30 % of the votes.
        """
        error_NT = self.errors(features_ND)
        if not self.tasks:
            return Routes(gate_NT=error_NT, chosen=((),) * len(features_ND), error_NT=error_NT)
        if mode == "per_sample":
            gate_NT = router_select(error_NT, self._thresholds_T, top_k=self.settings.top_k)
            order = [sorted(range(len(row)), key=row.__getitem__) for row in error_NT.tolist()]
            chosen = tuple(
                tuple(self.tasks[t] for t in best_first if gate[t])
                for best_first, gate in zip(order, gate_NT.tolist(), strict=True)
            )
            return Routes(gate_NT=gate_NT, chosen=chosen, error_NT=error_NT)
        if mode != "batch_vote":
            raise ValueError(f"mode: got {mode!r}; expected 'per_sample' or 'batch_vote'.")
        votes = router_select(error_NT, self._thresholds_T, top_k=1).sum(dim=0).tolist()
        ranked = sorted((t for t in range(len(votes)) if votes[t] > 0), key=lambda t: -votes[t])
        elected = [t for i, t in enumerate(ranked[:2]) if i == 0 or votes[t] >= VOTE_SHARE * sum(votes)]
        gate_NT = torch.zeros_like(error_NT)
        gate_NT[:, elected] = 1.0
        chosen = (tuple(self.tasks[t] for t in elected),) * len(features_ND)
        return Routes(gate_NT=gate_NT, chosen=chosen, error_NT=error_NT)

    def nearest(self, features_ND: Tensor, *, within_threshold: bool = False) -> Tensor:
        """The old task of the lowest error, for each sample of a NEW task: index into `tasks` [N] int64, -1 = none.

        ``within_threshold`` drops it where that error is above the task's threshold.
        """
        if not self.tasks:
            return torch.full((len(features_ND),), -1, dtype=torch.int64, device="cpu")
        lowest_N, index_N = self.errors(features_ND).min(dim=1)
        if within_threshold:
            index_N = torch.where(lowest_N <= self._thresholds_T[index_N], index_N, -1)
        return index_N.cpu()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON) for `load_state`; the tensors are copies."""
        tensors = {name: tensor.clone() for name, tensor in self._weights.items()}
        if self.tasks:
            tensors["threshold_T"] = self._thresholds_T.clone()
        meta = {"tasks": list(self.tasks), "training_errors": {k: list(v) for k, v in self.training_errors.items()}}
        return tensors, meta

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Restores `state()`; raises ValueError when the tensors are not those of the tasks named."""
        tasks = tuple(meta["tasks"])
        names = {"encoder_weight_THD", "encoder_bias_TH", "decoder_weight_TDH", "decoder_bias_TD", "threshold_T"}
        counts = {name: len(tensor) for name, tensor in tensors.items()}
        if counts != dict.fromkeys(names if tasks else (), len(tasks)):
            raise ValueError(
                f"router state: got tensors of {counts} tasks; expected {sorted(names)} with {len(tasks)} each, for "
                f"{tasks}. Load tensors and JSON of one state."
            )
        self.tasks = tasks
        self.training_errors = {task: (first, last) for task, (first, last) in meta["training_errors"].items()}
        self._weights = {name: tensors[name].clone() for name in tensors if name != "threshold_T"}
        self._thresholds_T = tensors["threshold_T"].clone() if tasks else torch.empty(0, device="cpu")
