# SPDX-License-Identifier: Apache-2.0
"""IconQA's choices by text: `iconqa/{train,val,test}/choose_txt/<id>/` with data.json and image.png.

`data.json` is {question, choices, answer: the place of the right one}. `iconqa_data/` around it may be there or not.
"""

from __future__ import annotations

from pathlib import Path
from string import ascii_uppercase

from dmole.data.layouts.base import Dropped, Layout, Rows, choice, first_of, read_json

SPLITS = {"train": "train", "validation": "val", "test": "test"}


def _rows(source: Path, split: str, images: Path) -> Rows:
    root = first_of(source, "iconqa_data/iconqa", "iconqa", "train").relative_to(source)
    root = root.parent if root.name == "train" else root
    folder = root / SPLITS[split] / "choose_txt"
    if split != "validation" and not (source / folder).is_dir():
        raise FileNotFoundError(f"{source}: got no {folder}")
    # By number, not by text: 10 comes after 9.
    for problem in sorted((source / folder).glob("*/data.json"), key=lambda path: (len(path.parent.name), path)):
        record, key = read_json(problem), problem.parent.name
        options, place = list(map(str, record["choices"])), record["answer"]
        if not isinstance(place, int) or not 0 <= place < len(options):
            yield Dropped(f"{folder}/{key}", "answer is the place of no choice")
            continue
        yield {
            "id": key,
            "images": [f"{folder.as_posix()}/{key}/image.png"],
            "instruction": choice(record["question"], options),
            "options": options,
            "answers": [ascii_uppercase[place]],
        }


LAYOUT = Layout(metric="option_letter", files="iconqa_data/iconqa/{train,val,test}/choose_txt/<id>/", rows=_rows)
