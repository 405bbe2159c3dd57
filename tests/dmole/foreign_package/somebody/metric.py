# SPDX-License-Identifier: Apache-2.0
"""The first word of an answer, whatever follows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from dmole.metrics import Metric, Scorable
from dmole.metrics.base import check_lengths


class FirstWord(Metric):
    """1 where the first words are equal."""

    name: ClassVar[str] = "first_word"

    def score_samples(self, predictions: Sequence[str], samples: Sequence[Scorable]) -> list[float]:
        check_lengths(self.name, predictions, samples)
        firsts = [[answer.split()[:1] for answer in sample.answers] for sample in samples]
        return [float(said.split()[:1] in right) for said, right in zip(predictions, firsts, strict=True)]

    def well_formed(self, prediction: str, sample: Scorable) -> bool:
        return bool(prediction.split())

    def check(self, sample: Scorable, *, test: bool) -> list[str]:
        return [f"answer {answer!r} has no word" for answer in sample.answers if not answer.split()]
