# SPDX-License-Identifier: Apache-2.0
"""The blocks of a Markdown file that are made, not typed, between two markers that stay:

<!-- KIND: words -->
(made)
<!-- /KIND -->
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from dmole.reports.stored import ResultsError


def filled(path: Path, kind: str, asked: str, make: Callable[[Sequence[str]], str]) -> str:
    """The file's text with `make(words)` in every block of a kind; `asked` stands for the words in the error.

    ResultsError for a marker without its partner.
    """
    text = path.read_text(encoding="utf-8")
    block = re.compile(
        rf"^(?P<begin><!-- {kind}: (?P<words>[^\n]*?) -->)\n(?P<body>.*?)^(?P<end><!-- /{kind} -->)$",
        re.MULTILINE | re.DOTALL,
    )
    markers = re.findall(rf"^<!-- (?:{kind}:.*|/{kind}) -->$", text, re.MULTILINE)
    if len(markers) != 2 * len(block.findall(text)):
        raise ResultsError(
            f"{path}: a marker has no partner; expected '<!-- {kind}: {asked} -->', then '<!-- /{kind} -->'."
        )
    return block.sub(lambda found: f"{found['begin']}\n\n{make(found['words'].split())}\n{found['end']}", text)
