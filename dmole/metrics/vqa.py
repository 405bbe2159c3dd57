# SPDX-License-Identifier: Apache-2.0
"""score = mean over the 10 annotators k of min(1, #{j != k : answer_j = prediction} / 3): VQA soft accuracy.

Antol et al., "VQA: Visual Question Answering" (ICCV 2015) and its evaluation page: each annotator is left out once, so
an answer given by exactly three of ten scores 0.9, by four or more 1.0, by one 0.3.

`normalise_vqa` follows the published normalisation: line breaks and outer spaces go; each punctuation mark is deleted
where it touches a space or where the text holds a number with a comma, else it becomes a space; a period that is not
part of a number goes; lower case; number words up to ten become digits ("none" too: 0); the articles a, an, the go.
Two differences, both towards what that code means to do:
- it restores missing apostrophes from a table of contractions (dont -> don't) after having blanked the apostrophes of
  whoever wrote them; here an apostrophe inside a word is dropped, which makes the same pairs equal without a table;
- it leaves the annotators' answers raw when all ten agree, so that "The Cat" from all ten can be matched by nothing;
  here both sides are always normalised.
"""

import re
from collections.abc import Sequence
from typing import ClassVar

from dmole.metrics.base import Metric, Scorable, check_lengths
from dmole.metrics.text import answer_kind

ANNOTATORS = 10
_MARKS = ';:/[]"()=+\\_><@`,?!{}'
_DIGITS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
_LOOSE_PERIOD = re.compile(r"\.(?!\d)")
_APOSTROPHE = re.compile(r"(?<=\w)['’](?=\w)")  # noqa: RUF001


def normalise_vqa(text: str) -> str:
    """The normal form in which VQA answers are compared; see the module's docstring. May be empty ("the" -> "")."""
    text = _APOSTROPHE.sub("", " ".join(text.split())).replace("'", " ")
    delete_all = _NUMBER_WITH_COMMA.search(text) is not None
    shown = text
    for mark in _MARKS:
        touches_space = mark + " " in text or " " + mark in text
        shown = shown.replace(mark, "" if delete_all or touches_space else " ")
    words = [_DIGITS.get(word, word) for word in _LOOSE_PERIOD.sub("", shown).lower().split()]
    return " ".join(word for word in words if word not in _ARTICLES)


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Leave-one-annotator-out accuracy of one prediction, in [0, 1]; an empty prediction scores 0 in every case."""
    said = normalise_vqa(prediction)
    if not said:
        return 0.0
    agrees = [normalise_vqa(answer) == said for answer in answers]
    total = sum(agrees)
    return sum(min(1.0, (total - own) / 3) for own in agrees) / len(agrees)


class VqaAccuracy(Metric):
    """Soft accuracy over ten annotators' answers."""

    name: ClassVar[str] = "vqa"
    title: ClassVar[str] = "VQA accuracy"

    def score_samples(self, predictions: Sequence[str], samples: Sequence[Scorable]) -> list[float]:
        check_lengths(self.name, predictions, samples)
        for sample in samples:
            if len(sample.answers) != ANNOTATORS:
                raise ValueError(
                    f"vqa: got {len(sample.answers)} answers {list(sample.answers)}; expected the {ANNOTATORS} "
                    "annotators' answers. Give ten, or use the metric exact_match."
                )
        return [soft_accuracy(p, s.answers) for p, s in zip(predictions, samples, strict=True)]

    def well_formed(self, prediction: str, sample: Scorable) -> bool:
        """A short answer: a number or words (not an option letter, not a box), at most twice the longest reference."""
        longest = max(len(normalise_vqa(answer).split()) for answer in sample.answers)
        words = normalise_vqa(prediction).split()
        kinds = {"number", "words"} | {answer_kind(answer) for answer in sample.answers}
        return 1 <= len(words) <= max(3, 2 * longest) and answer_kind(prediction) in kinds

    def check(self, sample: Scorable, *, test: bool) -> list[str]:
        problems = [
            f"answers[{i}] is {answer!r}, of which the VQA normalisation leaves nothing; expected a word or a number"
            for i, answer in enumerate(sample.answers)
            if not normalise_vqa(answer)
        ]
        if test and len(sample.answers) != ANNOTATORS:
            problems.append(
                f"answers has {len(sample.answers)} entries; the metric vqa needs the {ANNOTATORS} annotators' answers "
                "(repeat an answer that several gave), or use the metric exact_match"
            )
        return problems
