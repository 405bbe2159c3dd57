# SPDX-License-Identifier: Apache-2.0
"""Forms of short answers, shared by the metrics: normal form for comparison, and the kind of thing an answer is."""

import re
from typing import Literal
from unicodedata import normalize

AnswerKind = Literal["empty", "number", "numbers", "letter", "words"]

_NUMBER = re.compile(r"[-+]?\d[\d.,:]*%?")
_EDGES = " \t\r\n.,;:!?\"'`"
_START = re.compile(rf"(?:(?![.,:]\d)[{re.escape(_EDGES)}])+")
# Full-width forms of ASCII, and the punctuation of other scripts and of typography as that of ASCII.
_MARKS = {
    ".": "。｡।", ",": "、､・･،", ";": "؛", "?": "؟", "'": "‘’ʼ‚", '"': "「」『』｢｣《》〈〉«»‹›“”„",  # noqa: RUF001
    "[": "【〔", "]": "】〕", "-": "‐‑‒–—−",  # noqa: RUF001
}  # fmt: skip
_PLAIN = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_PLAIN |= {ord(mark): plain for plain, marks in _MARKS.items() for mark in marks}


def normal_form(text: str) -> str:
    """Lower-case, one space between words, no punctuation at the ends: what exact match compares.

    "  The Pacific. " -> "the pacific". Punctuation inside stays: "3.5" and "35" are different answers, and so are ".5"
    and "5". Composed characters (NFC), full-width forms, and the quotes, dashes and full stops of other scripts are
    those of ASCII: "「東京」。" -> "東京", "１２％" -> "12%".
    """
    text = normalize("NFC", normalize("NFC", text).translate(_PLAIN).casefold())
    text = " ".join(text.split()).rstrip(_EDGES)
    start = _START.match(text)
    return text if start is None else text[start.end() :]


def answer_kind(normal: str) -> AnswerKind:
    """What a short answer looks like, wherever it came from; of its normal form.

    number: one number ("042", "3.5 %"); numbers: several and nothing else (a box); letter: a single letter (an option);
    words: anything else with a letter or a symbol in it; empty: nothing but spaces and punctuation.
    """
    words = normal.replace(" %", "%").split()
    if not words:
        return "empty"
    if all(_NUMBER.fullmatch(word.strip(_EDGES + "()[]")) for word in words):
        return "number" if len(words) == 1 else "numbers"
    if len(words) == 1 and len(letters := words[0].strip("()[].:")) == 1 and letters.isalpha():
        return "letter"
    return "words"
