# SPDX-License-Identifier: Apache-2.0
"""The loss on a stage's validation samples while it trains, the best weights so far, and when to stop.

loss = sum over the validation samples' answer tokens of -log p / their number
better:  loss < best - early_stopping_threshold;   stop after early_stopping_patience losses that are not better
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from dmole.training.acceleration import summed
from dmole.training.batches import Piece, answer_tokens, load, pieces_of
from dmole.training.settings import TrainingSettings

if TYPE_CHECKING:
    from dmole.data.sample import Sample
    from dmole.methods.base import Method


def validation_loss(
    method: Method, samples: Sequence[Sample], settings: TrainingSettings, accelerator: Accelerator
) -> float:
    """Mean cross-entropy over the answer tokens of `samples`, shared by the processes.

    The model computes in evaluation mode. The random state is put back, whatever computes in between: dropout goes on
    as if nothing had been measured.
    """
    model = method.vlm.model
    modes = [(module, module.training) for module in model.modules()]
    device = accelerator.device
    devices = [] if device.type == "cpu" else [device]
    pieces: list[Piece] = pieces_of(
        range(len(samples)),
        settings.per_device_eval_batch_size,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    losses: list[Tensor] = []
    tokens: list[int] = []
    model.train(False)
    try:
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"), torch.no_grad():
            for ((piece, batch),) in load(method.vlm, samples, ([piece] for piece in pieces), workers=0):
                tokens.append(answer_tokens(batch) * piece.counts)
                batch = send_to_device(batch, device)
                with method.validation_gates(batch), accelerator.autocast():
                    losses.append(method.loss(batch).detach())
    finally:
        for module, training in modes:
            module.training = training
    total, count = summed(
        accelerator, math.fsum(float(loss) * n for loss, n in zip(losses, tokens, strict=True)), sum(tokens)
    )
    return total / count


class Validation:
    """The validation losses of a stage, its best weights and its patience."""

    def __init__(self, settings: TrainingSettings, parameters: Mapping[str, nn.Parameter]) -> None:
        self.settings = settings
        self.parameters = parameters
        self.history: list[tuple[int, float]] = []
        self.best: tuple[int, float] | None = None
        self.best_weights: dict[str, Tensor] = {}
        self.not_better = 0

    def add(self, step: int, loss: float) -> None:
        """Take note of the loss after `step` steps."""
        self.history.append((step, loss))
        if self.best is None or loss < self.best[1]:
            kept = self.best is None or self.best[1] - loss > self.settings.early_stopping_threshold
            self.best = (step, loss)
            if self.settings.load_best_model_at_end:
                self.best_weights = {name: p.detach().clone() for name, p in self.parameters.items()}
        else:
            kept = False
        self.not_better = 0 if kept else self.not_better + 1

    @property
    def exhausted(self) -> bool:
        """Whether `early_stopping_patience` losses in a row were not better."""
        patience = self.settings.early_stopping_patience
        return patience > 0 and self.not_better >= patience

    def load_best(self) -> None:
        """The parameters take the values that they had at the lowest loss, if the settings ask for it."""
        with torch.no_grad():
            for name, value in self.best_weights.items():
                self.parameters[name].copy_(value)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON for `load_state`."""
        meta = {"history": self.history, "best": self.best, "not_better": self.not_better}
        return dict(self.best_weights), meta

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Restore `state()`."""
        self.best_weights = {name: tensor.clone() for name, tensor in tensors.items()}
        self.history = [(int(step), float(loss)) for step, loss in meta["history"]]
        self.best = None if meta["best"] is None else (int(meta["best"][0]), float(meta["best"][1]))
        self.not_better = int(meta["not_better"])
