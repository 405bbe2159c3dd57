# SPDX-License-Identifier: Apache-2.0
"""CIDEr = 10/4 * sum_{n=1..4} mean_refs cos(tfidf_n(prediction), tfidf_n(reference)) * exp(-(len difference)^2 / 72).

The scorer is pycocoevalcap's (the COCO caption evaluation code; counts of the prediction clipped at the reference's, as
there: what the field calls CIDEr and the paper of Vedantam, Zitnick and Parikh, CVPR 2015, calls CIDEr-D). A perfect
score of one sample is 10; tables print CIDEr x 100, so a caption task can exceed 100 points, and reach 1000.

`cider_percent` is the same number over its maximum, CIDEr x 10, from 0 to 100 points. Where captions are written by
rule, CIDEr x 100 is in the hundreds, and a mean over tasks would be a mean over the caption tasks: the mini benchmark
therefore scores its captions in percent. Multiply by 10 for the usual figure.

CIDEr is a corpus metric: the idf weights come from the references of the WHOLE test split. The score of one sample
therefore depends on which other samples are tested, scores of subsets cannot be averaged into the score of the union,
and a split of one sample has all its weights at log(1/1) = 0. So has one whose references are all equal: it is refused.

What can be reached is seldom the maximum. A caption of w < 4 words has no n-grams of more words, and reaches w/4 of it
(one word: 2.5); the mean over the references charges every difference between them; words that every sample's
references hold weigh nothing. `Metric.ceiling`, the score of the taught captions, stands beside each score.

Tokenisation: the COCO code runs Stanford's PTBTokenizer, which needs Java. `ptb_tokens` follows its rules in Python:

- lower case; quotes and dashes of typography become their plain forms;
- clitics are split off: "don't" -> do n't, "it's" -> it 's; "cannot" -> can not;
- a number keeps its inner separators (3.5, 1,000, 12:30, 1/2) and its ending (1960s, 3rd);
- an abbreviation with inner periods is one token (u.s.); hyphenated words are one token;
- every other symbol is a token of its own ($ % & # @ / * + =);
- then the punctuation that the COCO code drops is dropped: '' ' `` ` . ? ! , : - -- ... ; and brackets.

Known differences: brackets are dropped here, whereas PTBTokenizer in lower-case mode leaves "-lrb-" behind; a final
abbreviation ("in the u.s.") does not produce a second period (dropped there anyway); no table of known abbreviations
("mr." is `mr` here, `mr.` there). Numbers are comparable between runs of this package; across packages only to the
extent that the captions avoid these cases.
"""

import re
from collections.abc import Sequence
from typing import ClassVar

from pycocoevalcap.cider.cider_scorer import CiderScorer

from dmole.metrics.base import Metric, Scorable, check_lengths

_TYPOGRAPHY = str.maketrans(
    {"‘": "'", "’": "'", "ʼ": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "...", "\u00a0": " "}  # noqa: RUF001
)
_CLITIC = re.compile(r"(?<=[^\W\d_])('(?:s|m|d|ll|re|ve))(?![^\W_])")
_NEGATION = re.compile(r"(?<=[^\W\d_])(n't)(?![^\W_])")
_TOKEN = re.compile(
    r"n't(?!\w)"  # what the clitic rules split off
    r"|'(?:s|m|d|ll|re|ve)(?!\w)"
    r"|\d+(?:[.,:/]\d+)*(?:st|nd|rd|th|s)?(?![^\W_])"
    r"|(?:[^\W\d_]\.){2,}"
    r"|[^\W_]+(?:[-'][^\W_]+)*"
    r"|\.{2,}|-{2,}|\S"
)
_DROPPED = frozenset("\" ' ` '' `` . ? ! , : ; - ( ) [ ] { } _".split())


def ptb_tokens(text: str) -> list[str]:
    """The words of a caption, by the rules in the module's docstring."""
    text = text.translate(_TYPOGRAPHY).lower()
    text = re.sub(r"\bcannot\b", "can not", text)
    text = _CLITIC.sub(r" \1", _NEGATION.sub(r" \1", text))
    return [t for t in _TOKEN.findall(text) if t not in _DROPPED and not set(t) <= {"."} and not set(t) <= {"-"}]


class Cider(Metric):
    """CIDEr of captions against several references; see the module's docstring for the exact variant."""

    name: ClassVar[str] = "cider"
    minimum_samples: ClassVar[int] = 2

    def score_samples(self, predictions: Sequence[str], samples: Sequence[Scorable]) -> list[float]:
        check_lengths(self.name, predictions, samples)
        if len(samples) < self.minimum_samples:
            raise ValueError(
                f"{self.name}: got {len(samples)} test samples; expected at least {self.minimum_samples}, because its "
                "word weights come from the references of the whole test split. Test on more samples."
            )
        if problems := self.check_split(samples):
            raise ValueError(f"{self.name}: {problems[0]}.")
        scorer = CiderScorer()
        for prediction, sample in zip(predictions, samples, strict=True):
            references = [" ".join(ptb_tokens(answer)) for answer in sample.answers]
            scorer += (" ".join(ptb_tokens(prediction)), references)
        _, scores = scorer.compute_score()
        return [float(score) for score in scores]

    def well_formed(self, prediction: str, sample: Scorable) -> bool:
        """A caption has between half the words of the shortest and twice those of the longest reference (and one)."""
        lengths = [len(ptb_tokens(answer)) for answer in sample.answers]
        words = len(ptb_tokens(prediction))
        return words >= 1 and min(lengths) <= 2 * words and words <= 2 * max(lengths)

    def check(self, sample: Scorable, *, test: bool) -> list[str]:
        return [
            f"answers[{i}] is {answer!r}, which has no words; expected a caption"
            for i, answer in enumerate(sample.answers)
            if not ptb_tokens(answer)
        ]

    def check_split(self, samples: Sequence[Scorable]) -> list[str]:
        """All references are equal: every word is in all of them, weighs log(1) = 0, and every caption scores 0."""
        said = {frozenset(tuple(ptb_tokens(answer)) for answer in sample.answers) for sample in samples}
        if len(samples) < self.minimum_samples or len(said) > 1:
            return []
        return [
            f"all {len(samples)} test samples have the same references {list(samples[0].answers)}; the metric "
            f"{self.name} weighs words by how few samples have them, and scores every caption 0 here. Give the samples "
            "captions of their own, or use the metric exact_match"
        ]


class CiderPercent(Cider):
    """CIDEr in percent of its maximum of 10, so that a caption task weighs like any other in a mean over tasks."""

    name: ClassVar[str] = "cider_percent"

    def score_samples(self, predictions: Sequence[str], samples: Sequence[Scorable]) -> list[float]:
        return [score / 10.0 for score in super().score_samples(predictions, samples)]
