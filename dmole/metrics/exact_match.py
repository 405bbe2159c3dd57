# SPDX-License-Identifier: Apache-2.0
"""score = 1 if normal_form(prediction) is the normal form of one of the references, else 0.

The normal form (`text.normal_form`) folds case and the forms of Unicode, joins runs of spaces and drops punctuation at
the two ends. Nothing else is forgiven: no substring match (a model that lists every country would be right), no
rounding.
"""

from typing import ClassVar

from dmole.metrics.base import Metric, SampleMetric, Scorable
from dmole.metrics.earlier import version_1
from dmole.metrics.text import answer_kind, normal_form


class ExactMatch(SampleMetric):
    """Right when the answer is one of the references."""

    name: ClassVar[str] = "exact_match"
    version: ClassVar[int] = 2
    earlier: ClassVar[tuple[type[Metric], ...]] = (version_1.ExactMatch,)

    def score(self, prediction: str, sample: Scorable) -> float:
        said = normal_form(prediction)
        # An empty prediction must not meet a reference that is only punctuation.
        return float(bool(said) and any(said == normal_form(answer) for answer in sample.answers))

    def well_formed(self, prediction: str, sample: Scorable) -> bool:
        """Of the kind of a reference (number, letter, words) and at most twice as many words as the longest."""
        said, given = normal_form(prediction), [normal_form(answer) for answer in sample.answers]
        longest = max(len(answer.split()) for answer in given)
        return answer_kind(said) in set(map(answer_kind, given)) and len(said.split()) <= max(2, 2 * longest)

    def check(self, sample: Scorable, *, test: bool) -> list[str]:
        return [
            f"answers[{i}] is {answer!r}, of which exact match leaves nothing; expected a word or a number"
            for i, answer in enumerate(sample.answers)
            if not normal_form(answer)
        ]
