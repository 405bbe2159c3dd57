# SPDX-License-Identifier: Apache-2.0
"""z, what the router reads of a sample: features of the frozen pretrained model, computed once and kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dmole.data.collate import collate
from dmole.models.adapters import as_pretrained
from dmole.models.towers import VISION
from dmole.training.processes import process, shared

if TYPE_CHECKING:
    from dmole.data.sample import Sample
    from dmole.models.prompts import Encoded
    from dmole.models.vision_language import VisionLanguageModel


def router_features(vlm: VisionLanguageModel, samples: Sequence[Sample], *, batch_size: int = 32) -> Tensor:
    """z_ND: ``normalise([max_t vision_BTD ; max_t text_BTD])``, L2-normalised rows, fp32, without a graph.

    The text is the instruction alone (no image, no answer). A sample without images has zeros for the vision tower, and
    a model without one has the text alone. Call it outside any gates: experts have to be off.
    """
    chunks: list[Tensor] = []
    for start in range(0, len(samples), batch_size):
        chunk = samples[start : start + batch_size]
        encoded = collate(vlm, chunk, with_answers=False).encoded if VISION in vlm.towers else None
        try:
            chunks.append(encoded_features(vlm, encoded, [sample.instruction for sample in chunk]))
        except ValueError as error:
            raise ValueError(f"samples {chunk[0].id!r} to {chunk[-1].id!r}: {error}") from error
    return torch.cat(chunks) if chunks else torch.empty(0, 0, device="cpu")


def encoded_features(vlm: VisionLanguageModel, encoded: Encoded | None, instructions: Sequence[str]) -> Tensor:
    """z_BD of a batch that is encoded already; `encoded` is None for a model without a vision tower."""
    with torch.no_grad(), as_pretrained(vlm.model):
        parts_BD = [] if encoded is None else [vlm.vision_features(encoded)[0]]
        parts_BD.append(vlm.text_features(instructions))
        device = parts_BD[0].device
        return F.normalize(torch.cat([part_BD.to(device) for part_BD in parts_BD], dim=1), dim=1)


def shared_features(vlm: VisionLanguageModel, samples: Sequence[Sample], *, batch_size: int) -> Tensor:
    """`router_features`, computed by all processes together.

    The batches are those of one process, however many share them, because a batch decides the last bits of a feature.
    """
    if process()[1] == 1:
        return router_features(vlm, samples, batch_size=batch_size)

    def batch(place: int) -> Tensor:
        chunk = samples[place * batch_size : (place + 1) * batch_size]
        return router_features(vlm, chunk, batch_size=batch_size).cpu()

    chunks = shared(math.ceil(len(samples) / batch_size), batch)
    return torch.cat(chunks).to(vlm.model.device) if chunks else torch.empty(0, 0, device="cpu")


class FeatureStore:
    """``features(samples)`` -> z_ND, each batch computed once: a batch that is asked for again is read from memory.

    Entries are whole batches, kept by their samples' images and instructions (ids may repeat between tasks) and by the
    number of threads, because these decide the last bits of z. A store of single samples would give a sample the bits
    of the batch in which it came first. Every stage tests the same batches, so each is computed once a run.
    """

    def __init__(self, vlm: VisionLanguageModel, *, batch_size: int = 32) -> None:
        self._vlm = vlm
        self._batch_size = batch_size
        self._kept: dict[tuple[int, tuple[tuple[tuple[str, ...], str], ...]], Tensor] = {}

    def __len__(self) -> int:
        """How many batches are kept."""
        return len(self._kept)

    def features(self, samples: Sequence[Sample]) -> Tensor:
        """z_ND of the samples, in their order."""
        key = (
            torch.get_num_threads(),
            tuple((tuple(map(str, sample.images)), sample.instruction) for sample in samples),
        )
        if key not in self._kept:
            self._kept[key] = router_features(self._vlm, samples, batch_size=self._batch_size)
        # A copy: the caller may write into it.
        return self._kept[key].clone()
