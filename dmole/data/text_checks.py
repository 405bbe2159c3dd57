# SPDX-License-Identifier: Apache-2.0
"""What JSON can hold and no run can: texts that cannot be written, numbers without an end, names that no file has.

Found before training, because a half surrogate pair in an answer trains well and fails when the result is written.
"""

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

LONGEST_NAME = 255  # bytes, of ext4, XFS, APFS and NTFS alike
LONGEST_PATH = 4095  # bytes, of Linux
DIGITS = 19


def parse_json(text: str, pairs: Callable[[list[tuple[str, Any]]], Any]) -> Any:
    """One line of JSON, its objects made by `pairs`. Raises ValueError with what is wrong as a finding says it."""
    try:
        return json.loads(text, object_pairs_hook=pairs, parse_int=_integer, parse_constant=_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at column {error.colno}; expected one object per line") from error
    except RecursionError as error:
        raise ValueError("is not a sample: JSON nested too deeply; expected one flat object per line") from error


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > DIGITS:
        raise ValueError(f"holds an integer of {len(digits.lstrip('-'))} digits; expected at most {DIGITS}")
    return int(digits)


def _constant(name: str) -> float:
    raise ValueError(f"is not JSON: it holds {name}, which JSON has not; expected a finite number or null")


def text_complaint(text: str) -> str | None:
    """Why `text` cannot be written to a file; None if it can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return (
            f"holds half of a surrogate pair ({text[error.start]!a} at character {error.start + 1}); "
            f"expected whole Unicode characters"
        )
    place = text.find("\0")
    return None if place < 0 else f"holds the character NUL at character {place + 1}; expected text without it"


def text_complaints(value: Any, where: str = "") -> list[str]:
    """`text_complaint` of every string and key in a JSON value whose objects are lists of pairs."""
    return [
        f"{ascii(place)[1:-1][:80]} {found}" for place, text in _texts(value, where) if (found := text_complaint(text))
    ]


def _texts(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where or "text", value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, tuple):
                yield f"{where}{'.' * bool(where)}key {index + 1}", item[0]
                yield from _texts(item[1], f"{where}{'.' * bool(where)}{item[0]}")
            else:
                yield from _texts(item, f"{where}[{index}]")


def path_complaint(path: str) -> str | None:
    """Why `path` cannot name a file on this machine, whether it exists or not."""
    head, colon, _ = path[:32].partition(":")
    if colon and head.lower() in ("data", "http", "https", "ftp", "s3", "gs", "file"):
        kind = "a data URI" if head.lower() == "data" else f"a {head.lower()}: address"
        return f"is {kind}; expected the path of a file. Save the picture as a file"
    longest = max((len(part.encode("utf-8", "surrogatepass")) for part in path.split("/")), default=0)
    if longest > LONGEST_NAME:
        return f"has a name of {longest} bytes; expected at most {LONGEST_NAME}, the limit of file systems"
    size = len(os.fspath(path).encode("utf-8", "surrogatepass"))
    return f"is a path of {size} bytes; expected at most {LONGEST_PATH}" if size > LONGEST_PATH else None
