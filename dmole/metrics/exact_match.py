# SPDX-License-Identifier: Apache-2.0
"""score = 1 if normal_form(prediction) is the normal form of one of the references, else 0.

The normal form (`text.normal_form`) folds case, joins runs of spaces and drops punctuation at the two ends. Nothing
else is forgiven: no substring match (a model that lists every country would be right), no rounding.
"""

from collections.abc import Sequence
from typing import ClassVar

from dmole.metrics.base import Metric, Scorable, check_lengths
from dmole.metrics.text import answer_kind, normal_form


class ExactMatch(Metric):
    """Right when the answer is one of the references."""

    name: ClassVar[str] = "exact_match"
    title: ClassVar[str] = "exact match"

    def score_samples(self, predictions: Sequence[str], samples: Sequence[Scorable]) -> list[float]:
        check_lengths(self.name, predictions, samples)
        scores: list[float] = []
        for prediction, sample in zip(predictions, samples, strict=True):
            said = normal_form(prediction)
            # An empty prediction must not meet a reference that is only punctuation.
            right = bool(said) and any(said == normal_form(answer) for answer in sample.answers)
            scores.append(1.0 if right else 0.0)
        return scores

    def well_formed(self, prediction: str, sample: Scorable) -> bool:
        """Of the kind of a reference (number, letter, words) and at most twice as many words as the longest."""
        longest = max(len(normal_form(answer).split()) for answer in sample.answers)
        kinds = {answer_kind(answer) for answer in sample.answers}
        return answer_kind(prediction) in kinds and len(normal_form(prediction).split()) <= max(2, 2 * longest)

    def check(self, sample: Scorable, *, test: bool) -> list[str]:
        return [
            f"answers[{i}] is {answer!r}, of which exact match leaves nothing; expected a word or a number"
            for i, answer in enumerate(sample.answers)
            if not normal_form(answer)
        ]
