# SPDX-License-Identifier: Apache-2.0
"""Forms of short answers, shared by the metrics: normal form for comparison, and the kind of thing an answer is."""

import re
from typing import Literal

AnswerKind = Literal["empty", "number", "numbers", "letter", "words"]

_NUMBER = re.compile(r"[-+]?\d[\d.,:]*%?")
_EDGES = " \t\r\n.,;:!?\"'`"


def normal_form(text: str) -> str:
    """Lower-case, one space between words, no punctuation at the ends: what exact match compares.

    "  The Pacific. " -> "the pacific". Punctuation inside stays: "3.5" and "35" are different answers.
    """
    return " ".join(text.casefold().split()).strip(_EDGES)


def answer_kind(text: str) -> AnswerKind:
    """What a short answer looks like, wherever it came from.

    number: one number ("042", "3.5 %"); numbers: several and nothing else (a box); letter: a single letter (an option);
    words: anything else with a letter or a symbol in it; empty: nothing but spaces and punctuation.
    """
    words = normal_form(text).replace(" %", "%").split()
    if not words:
        return "empty"
    if all(_NUMBER.fullmatch(word.strip(_EDGES + "()[]")) for word in words):
        return "number" if len(words) == 1 else "numbers"
    if len(words) == 1 and len(letters := words[0].strip("()[].:")) == 1 and letters.isalpha():
        return "letter"
    return "words"
