# SPDX-License-Identifier: Apache-2.0
"""score = max_refs s, s = 1 - Levenshtein(prediction, reference) / max(lengths), and 0 where s < 0.5: ANLS.

Average Normalized Levenshtein Similarity of Biten et al., "Scene Text Visual Question Answering" (ICCV 2019), for
answers read from a picture: one wrong letter costs a little, another word everything. As in the evaluation program of
DocVQA, the distance is of the lower-case texts with single spaces, the lengths those of the texts as they are written.

The distance is rapidfuzz's: `pip install 'dmole[metrics]'`.
"""

from typing import ClassVar

from dmole.metrics.base import SampleMetric, Scorable
from dmole.metrics.text import normal_form

THRESHOLD = 0.5


def similarity(prediction: str, reference: str) -> float:
    """`1 - distance / length` of two texts, in [0, 1]; below the threshold 0."""
    from rapidfuzz.distance import Levenshtein  # of the extra `metrics`

    said, given = (" ".join(text.lower().split()) for text in (prediction, reference))
    length = max(len(prediction), len(reference))
    found = 1.0 - Levenshtein.distance(said, given) / length if length else 1.0
    return found if found >= THRESHOLD else 0.0


class Anls(SampleMetric):
    """Average normalised Levenshtein similarity to the nearest reference."""

    name: ClassVar[str] = "anls"
    requires: ClassVar[str] = "rapidfuzz"

    def score(self, prediction: str, sample: Scorable) -> float:
        return max(similarity(prediction, answer) for answer in sample.answers)

    def well_formed(self, prediction: str, sample: Scorable) -> bool:
        """Something was said, in at most twice as many words as the longest reference (and two)."""
        words = len(normal_form(prediction).split())
        return 1 <= words <= max(2, 2 * max(len(answer.split()) for answer in sample.answers))

    def check(self, sample: Scorable, *, test: bool) -> list[str]:
        return [
            f"answers[{i}] is {answer!r}, which has no characters; expected a text"
            for i, answer in enumerate(sample.answers)
            if not answer.strip()
        ]
