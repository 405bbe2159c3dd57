# SPDX-License-Identifier: Apache-2.0
"""Version 1 of exact match, option letter and VQA accuracy, as the results without a version were scored.

What later versions mend: exact match knew no Unicode and read ".5" as "5"; option letters were not found behind
markdown, brackets or "Final answer:"; VQA accuracy kept hyphens, blanked colons, dropped apostrophes and normalised
unanimous answers, none of which the published program does.
"""

import re
from collections.abc import Sequence
from typing import ClassVar

from dmole.metrics.base import SampleMetric, Scorable, option_letters
from dmole.metrics.text import answer_kind

_MARKS = ';:/[]"()=+\\_><@`,?!{}'
_DIGITS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}  # fmt: skip
_LETTER = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+)?(?:answer|option)(?:\s+is)?\s*:?\s*)?"
    r"(?:\((?P<bracketed>[a-z])\)|(?P<bare>[a-z])(?=$|[.:),]))",
    re.IGNORECASE,
)


def normal_form(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" \t\r\n.,;:!?\"'`")


def normalise_vqa(text: str) -> str:
    text = re.sub(r"(?<=\w)['’](?=\w)", "", " ".join(text.split())).replace("'", " ")  # noqa: RUF001
    delete_all = re.search(r"\d,\d", text) is not None
    shown = text
    for mark in _MARKS:
        deleted = delete_all or mark + " " in text or " " + mark in text
        shown = shown.replace(mark, "" if deleted else " ")
    words = [_DIGITS.get(word, word) for word in re.sub(r"\.(?!\d)", "", shown).lower().split()]
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def parse_letter(prediction: str, options: Sequence[str]) -> str | None:
    match = _LETTER.match(prediction.strip())
    letter = None if match is None else (match["bracketed"] or match["bare"]).upper()
    return letter if letter in option_letters(options) else None


class _Earlier(SampleMetric):
    def check(self, sample: Scorable, *, test: bool) -> list[str]:
        return []  # data is checked by the present version


class ExactMatch(_Earlier):
    name: ClassVar[str] = "exact_match"

    def score(self, prediction: str, sample: Scorable) -> float:
        said = normal_form(prediction)
        return float(bool(said) and any(said == normal_form(answer) for answer in sample.answers))

    def well_formed(self, prediction: str, sample: Scorable) -> bool:
        said, given = normal_form(prediction), [normal_form(answer) for answer in sample.answers]
        longest = max(len(answer.split()) for answer in given)
        return answer_kind(said) in set(map(answer_kind, given)) and len(said.split()) <= max(2, 2 * longest)


class OptionLetter(_Earlier):
    name: ClassVar[str] = "option_letter"

    def score(self, prediction: str, sample: Scorable) -> float:
        return float(parse_letter(prediction, sample.options) == sample.answers[0])

    def well_formed(self, prediction: str, sample: Scorable) -> bool:
        return parse_letter(prediction, sample.options) is not None


class VqaAccuracy(_Earlier):
    name: ClassVar[str] = "vqa"

    def score(self, prediction: str, sample: Scorable) -> float:
        said = normalise_vqa(prediction)
        agrees = [bool(said) and normalise_vqa(answer) == said for answer in sample.answers]
        return sum(min(1.0, (sum(agrees) - own) / 3) for own in agrees) / len(agrees)

    def well_formed(self, prediction: str, sample: Scorable) -> bool:
        longest = max(len(normalise_vqa(answer).split()) for answer in sample.answers)
        kinds = {"number", "words"} | {answer_kind(normal_form(answer)) for answer in sample.answers}
        words = normalise_vqa(prediction).split()
        return 1 <= len(words) <= max(3, 2 * longest) and answer_kind(normal_form(prediction)) in kinds
