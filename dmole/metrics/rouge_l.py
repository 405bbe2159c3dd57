# SPDX-License-Identifier: Apache-2.0
"""score = max_refs 2 P R / (P + R), P = L / words of the prediction, R = L / words of the reference: ROUGE-L.

L is the length of the longest common subsequence of words. Lin, "ROUGE: A Package for Automatic Evaluation of
Summaries" (ACL workshop 2004), sentence level, as the package rouge-score computes `rougeL` without stemming: words are
runs of a-z and 0-9 of the lower-case text, so it measures English alone; references in other scripts are refused.

The subsequence is rapidfuzz's: `pip install 'dmole[metrics]'`.
"""

import re
from typing import ClassVar

from dmole.metrics.base import SampleMetric, Scorable

_SEPARATOR = re.compile(r"[^a-z0-9]+")


def words(text: str) -> list[str]:
    """Runs of a-z and 0-9 in lower case."""
    return _SEPARATOR.sub(" ", text.lower()).split()


def rouge_l(prediction: str, reference: str) -> float:
    """The F-measure of one prediction against one reference, in [0, 1]."""
    from rapidfuzz.distance import LCSseq  # of the extra `metrics`

    said, given = words(prediction), words(reference)
    common = int(LCSseq.similarity(said, given)) if said and given else 0
    return 2 * common / (len(said) + len(given)) if common else 0.0


class RougeL(SampleMetric):
    """ROUGE-L against the nearest reference."""

    name: ClassVar[str] = "rouge_l"
    requires: ClassVar[str] = "rapidfuzz"

    def score(self, prediction: str, sample: Scorable) -> float:
        return max(rouge_l(prediction, answer) for answer in sample.answers)

    def well_formed(self, prediction: str, sample: Scorable) -> bool:
        """Between half the words of the shortest and twice those of the longest reference (and one)."""
        lengths = [len(words(answer)) for answer in sample.answers]
        said = len(words(prediction))
        return said >= 1 and min(lengths) <= 2 * said and said <= 2 * max(lengths)

    def check(self, sample: Scorable, *, test: bool) -> list[str]:
        return [
            f"answers[{i}] is {answer!r}, which has no word of a-z and 0-9; ROUGE-L knows no others, expected English"
            for i, answer in enumerate(sample.answers)
            if not words(answer)
        ]
