# SPDX-License-Identifier: Apache-2.0
"""What a layout is: the files of a published data set, and its rows as plain rows or messages.

A layout yields rows whose images are paths from the source folder, and `Dropped` for a record that makes no row, with
the reason: nothing is left out without a word. Instructions are those of D-MoLE's public evaluation, the same for all
tasks of one output form, so that the wording does not tell which task a sample is of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

CAPTION = "Provide a one-sentence caption for the provided image."
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."

Row = dict[str, Any]


@dataclass(frozen=True)
class Dropped:
    """A record that makes no row: where it is, and why."""

    where: str
    why: str


Rows = Iterator["Row | Dropped"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A published layout of one task.

    Attributes:
        metric: what its answers are scored by.
        files: the files below the source folder, for messages.
        rows: (source folder, "train" | "validation" | "test", the folder of the images) -> its rows, with images
            relative to that folder; none for a split that the data set lacks. FileNotFoundError for a missing file.
        taught: see `dmole.data.sample.Sample`.
    """

    metric: str
    files: str
    rows: Callable[[Path, str, Path], Rows]
    taught: str = "last"


def read_json(path: Path) -> Any:
    """The document in a file. ValueError that names the file where it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: got no JSON ({error}); expected the file as published. Fetch it again.") from None


def first_of(folder: Path, *names: str) -> Path:
    """The first file or folder of these names that exists, or FileNotFoundError that lists them."""
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{folder}: got no {' or '.join(names)}")


def choice(question: str, options: Sequence[str]) -> str:
    """A question with its lettered options."""
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(ascii_uppercase, options, strict=False))
    return f"{question}\n{listed}\n{LETTER}"


def box(left: float, top: float, right: float, bottom: float) -> str:
    """A box in shares of the image's sides as the metric `iou` reads it."""
    return " ".join(str(min(99, max(0, round(100 * side)))) for side in (left, top, right, bottom))


def numbers(text: str) -> list[float]:
    """Every number in a text such as "[0.1, 0.25, 0.5, 1.0]"."""
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?", text)]
