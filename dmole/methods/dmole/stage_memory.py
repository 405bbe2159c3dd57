# SPDX-License-Identifier: Apache-2.0
"""What D-MoLE keeps of a task's training samples while it trains: their features, and the old task nearest to each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dmole.files import JSON


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """The running stage's samples by id: z, and the index of the nearest old task (-1: none)."""

    ids: tuple[str, ...]
    features_ND: Tensor
    neighbour_N: Tensor

    @cached_property
    def _row(self) -> Mapping[str, int]:
        return {sample: i for i, sample in enumerate(self.ids)}

    def neighbours(self, ids: Sequence[str]) -> Tensor:
        """The old task of each of these samples, [S] int64. ValueError for samples of another stage."""
        unknown = [sample for sample in ids if sample not in self._row]
        if unknown:
            raise ValueError(
                f"batch: got samples {unknown[:3]} that are not in this stage's training data; expected samples of its "
                f"task. Call begin_stage with the task that is trained."
            )
        return self.neighbour_N[torch.tensor([self._row[sample] for sample in ids], device="cpu")]

    def counts(self, tasks: Sequence[str]) -> dict[str, int]:
        """How many samples are nearest to each of the old `tasks`, by name; "" counts those that have none."""
        names = Counter(tasks[i] if i >= 0 else "" for i in self.neighbour_N.tolist())
        return dict(sorted(names.items()))

    def state(self) -> tuple[dict[str, Tensor], JSON]:
        """Tensors and JSON for `from_state`.

        The features go along: made again in other batches they would differ in the last bit, and an autoencoder trained
        on them in more than that.
        """
        tensors = {"features_ND": self.features_ND.clone(), "neighbour_N": self.neighbour_N.clone()}
        return tensors, {"ids": list(self.ids)}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], meta: JSON) -> StageMemory:
        # Cloned into torch's aligned memory: the bits of a product may depend on where its operands are.
        return cls(
            ids=tuple(meta["ids"]),
            features_ND=tensors["features_ND"].clone(),
            neighbour_N=tensors["neighbour_N"].clone(),
        )
