# SPDX-License-Identifier: Apache-2.0
"""score = max_refs 2 P R / (P + R), P and R the shares of words in common: the F1 of SQuAD.

Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text" (EMNLP 2016), as its evaluation program
counts (version 1.1): lower case, ASCII punctuation deleted ("3.5" is the word "35"), the articles a, an, the dropped;
a word said twice is common twice only if the reference has it twice.
"""

import re
import string
from collections import Counter
from typing import ClassVar

from dmole.metrics.base import SampleMetric, Scorable

_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """The words that are counted."""
    return _ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def f1(prediction: str, reference: str) -> float:
    """The F1 of one prediction against one reference, in [0, 1]."""
    said, given = Counter(words(prediction)), Counter(words(reference))
    common = (said & given).total()
    return 2 * common / (said.total() + given.total()) if common else 0.0


class TokenF1(SampleMetric):
    """F1 of words against the nearest reference."""

    name: ClassVar[str] = "token_f1"

    def score(self, prediction: str, sample: Scorable) -> float:
        return max(f1(prediction, answer) for answer in sample.answers)

    def well_formed(self, prediction: str, sample: Scorable) -> bool:
        """Something was said, in at most twice as many words as the longest reference (and two)."""
        return 1 <= len(words(prediction)) <= max(2, 2 * max(len(words(answer)) for answer in sample.answers))

    def check(self, sample: Scorable, *, test: bool) -> list[str]:
        return [
            f"answers[{i}] is {answer!r}, of which SQuAD's F1 leaves nothing; expected a word or a number"
            for i, answer in enumerate(sample.answers)
            if not words(answer)
        ]
