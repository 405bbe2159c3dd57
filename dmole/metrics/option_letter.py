# SPDX-License-Identifier: Apache-2.0
"""score = 1 if the letter that the prediction names is the answer's letter, else 0: multiple choice.

The letter is read strictly from the prediction and from the number of options of THAT sample: "B", "b", "B.", "(B)",
"B) a cat", "B: a cat", "Answer: B" and "The answer is B." name B; "A cat" names nothing (an article, not an option),
and "D" names nothing where a sample has three options. No letter, or an empty prediction, is wrong.
"""

import re
from collections.abc import Sequence
from typing import ClassVar

from dmole.metrics.base import Metric, Scorable, check_lengths, option_letters

_LETTER = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+)?(?:answer|option)(?:\s+is)?\s*:?\s*)?"
    r"(?:\((?P<bracketed>[a-z])\)|(?P<bare>[a-z])(?=$|[.:),]))",
    re.IGNORECASE,
)


def parse_letter(prediction: str, options: Sequence[str]) -> str | None:
    """The option letter that the prediction names, upper case; None if it names none of this sample's options."""
    match = _LETTER.match(prediction.strip())
    if match is None:
        return None
    letter = (match["bracketed"] or match["bare"]).upper()
    return letter if letter in option_letters(options) else None


class OptionLetter(Metric):
    """Right when the named letter is the answer's."""

    name: ClassVar[str] = "option_letter"
    title: ClassVar[str] = "option letter"

    def score_samples(self, predictions: Sequence[str], samples: Sequence[Scorable]) -> list[float]:
        check_lengths(self.name, predictions, samples)
        scores: list[float] = []
        for prediction, sample in zip(predictions, samples, strict=True):
            letter = parse_letter(prediction, sample.options)
            scores.append(1.0 if letter is not None and letter == sample.answers[0] else 0.0)
        return scores

    def well_formed(self, prediction: str, sample: Scorable) -> bool:
        """It names one of this sample's options."""
        return parse_letter(prediction, sample.options) is not None

    def check(self, sample: Scorable, *, test: bool) -> list[str]:
        letters = option_letters(sample.options)
        if not letters:
            return ["options is missing; the metric option_letter needs the list of option texts"]
        if len(sample.answers) != 1 or sample.answers[0] not in letters:
            return [
                f"answers is {list(sample.answers)}; expected exactly one of the option letters "
                f"{', '.join(letters)} ({len(letters)} options are listed)"
            ]
        return []

    def check_options(self, sample: Scorable) -> list[str]:
        return []  # `check` already asks for more
