# SPDX-License-Identifier: Apache-2.0
"""Counts code lines: lines that are not blank and belong to neither a comment nor a docstring.

    python scripts/code_lines.py            the core of dmole by room, and every method

The core is `dmole` without its methods, its reports (results as files, tables and pictures) and serving (`grown`: a
saved model and its use). `tests/test_code_lines.py` holds the limits.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE_THE_CORE = ("methods", "reports", "grown")
# What the files beside the methods are: the hooks, and what every method is given.
SHARED_BY_METHODS = ("__init__.py", "base.py", "budget.py", "settings.py")
NO_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


def code_lines(source: str) -> int:
    """How many lines of Python source have code on them; a string over several lines counts with all of them."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                docstrings.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def core() -> Counter[str]:
    """Code lines of each room of the core, "." for the files beside the rooms."""
    rooms: Counter[str] = Counter()
    for file in sorted((ROOT / "dmole").rglob("*.py")):
        room, *inside = file.relative_to(ROOT / "dmole").parts
        if room not in OUTSIDE_THE_CORE:
            rooms[room if inside else "."] += code_lines(file.read_text(encoding="utf-8"))
    return rooms


def methods() -> dict[str, int]:
    """Code lines of each method's file; of a method that is a folder, of its `method.py`."""
    folder = ROOT / "dmole" / "methods"
    files = [*folder.glob("*.py"), *folder.glob("*/method.py")]
    return {
        str(file.relative_to(folder)): code_lines(file.read_text(encoding="utf-8"))
        for file in sorted(files)
        if file.name not in SHARED_BY_METHODS
    }


if __name__ == "__main__":
    for room, count in core().most_common():
        print(f"{count:6,}  dmole/{room}")
    print(f"{core().total():6,}  core of dmole")
    for name, count in methods().items():
        print(f"{count:6,}  dmole/methods/{name}")
