# SPDX-License-Identifier: Apache-2.0
"""PMC-VQA: `train.csv` and `test_clean.csv` (or `test.csv`), pictures in `images/`.

Columns: Figure_path, Question, Choice A .. Choice D, Answer, and in some files Answer_label. A choice may begin with
its letter (" A: MRI"), which goes; `Answer` is a letter, or the text of a choice.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from dmole.data.layouts.base import Dropped, Layout, Rows, choice, first_of

LETTERS = "ABCD"


def _text(cell: str) -> str:
    return re.sub(r"^\s*[A-D]\s*:", "", cell).strip()


def _rows(source: Path, split: str, images: Path) -> Rows:
    if split == "validation":
        return
    file = source / "train.csv" if split == "train" else first_of(source, "test_clean.csv", "test.csv")
    folder = first_of(source, "images", "figures").name
    with file.open(encoding="utf-8-sig", newline="") as opened:
        for number, record in enumerate(csv.DictReader(opened), start=2):
            options = [_text(record[f"Choice {letter}"] or "") for letter in LETTERS]
            answer = (record.get("Answer_label") or record["Answer"] or "").strip()
            if answer not in LETTERS or not answer:
                places = [place for place, text in enumerate(options) if text == _text(answer)]
                if len(places) != 1:
                    yield Dropped(f"{file.name}:{number}", "answer is not one of the choices")
                    continue
                answer = LETTERS[places[0]]
            yield {
                "id": str(number),
                "images": [f"{folder}/{record['Figure_path']}"],
                "instruction": choice((record["Question"] or "").strip(), options),
                "options": options,
                "answers": [answer],
            }


LAYOUT = Layout(metric="option_letter", files="train.csv, test_clean.csv, images/", rows=_rows)
