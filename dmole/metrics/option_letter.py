# SPDX-License-Identifier: Apache-2.0
"""score = 1 if the letter that the prediction names is the answer's letter, else 0: multiple choice.

The letter is read strictly from the form of the prediction and from the number of options of THAT sample. It is
at the start of the first line, or after "answer:" or "the answer is" at the start of any line:

    B    b    B.    (B)    [B]    B) a cat    B: a cat    **B**    "B"    Option B    Answer: B    Final answer: **B.**
    The correct answer is option (b).    \\boxed{B}

Markdown and quotes do not count, full-width letters are plain ones. Nothing is guessed from prose: "A cat" and "I think
B" name nothing, nor do "A, B" and "A or B", nor two lines that name two answers, nor "D" where a sample has three
options. No letter, or an empty prediction, is wrong.
"""

import re
from collections.abc import Sequence
from typing import ClassVar
from unicodedata import normalize

from dmole.metrics.base import Metric, SampleMetric, Scorable, option_letters
from dmole.metrics.earlier import version_1

_DECORATION = str.maketrans("", "", "*`_\"'“”„«»‘’$")  # noqa: RUF001
_LINE = re.compile(
    r"[\s#>-]*"
    r"(?P<lead>(?:the\s+|my\s+)?(?:(?:final|correct|best|right)\s+)*(?:answer|option|choice)(?:\s+is)?\s*:?\s*(?:option\s+)?)?"
    r"(?:\\boxed)?(?:[(\[{]\s*(?P<bracketed>[a-z])\s*[)\]}]|(?P<bare>[a-z])(?=\s*$|[:;),\]]|\.(?![a-z](?:\.|$))))"
    r"(?P<rest>.*)",
    re.IGNORECASE,
)
# What follows a letter that is one of a list: another letter with a mark of its own, or "or".
_LISTED = re.compile(r"[\s.:;,)\]]*(?:(?:and|or)\b|[(\[]?[a-z]\s*(?:$|[.:;,)\]]|and\b|or\b))", re.IGNORECASE)


def parse_letter(prediction: str, options: Sequence[str]) -> str | None:
    """The option letter that the prediction names, upper case; None if it names none of this sample's options."""
    lines = normalize("NFKC", prediction).translate(_DECORATION).strip().splitlines()
    matches = [match for line in lines if (match := _LINE.match(line))]
    marked = [match for match in matches if "answer" in (match["lead"] or "").lower()]
    if not marked and not (matches and matches[0].string == lines[0]):
        return None
    named: set[str] = set()
    for match in marked or matches[:1]:
        letter = (match["bracketed"] or match["bare"]).upper()
        if letter not in option_letters(options):
            return None
        text = options[option_letters(options).index(letter)]
        own = match["rest"].strip(" .:;,)]").casefold() == text.strip(" .:;,)]").casefold()
        if _LISTED.match(match["rest"]) and not own:
            return None
        named.add(letter)
    return named.pop() if len(named) == 1 else None


class OptionLetter(SampleMetric):
    """Right when the named letter is the answer's."""

    name: ClassVar[str] = "option_letter"
    version: ClassVar[int] = 2
    earlier: ClassVar[tuple[type[Metric], ...]] = (version_1.OptionLetter,)

    def score(self, prediction: str, sample: Scorable) -> float:
        return float(parse_letter(prediction, sample.options) == sample.answers[0])

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
