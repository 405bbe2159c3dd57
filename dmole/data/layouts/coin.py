# SPDX-License-Identifier: Apache-2.0
"""CoIN: `<task>/train.json` (LLaVA's conversations) and `<task>/test.json` (question_id, image, text, answer).

The folder of one instruction type, such as `Instruction_Type1`, is the source; images are below `--images`, CoIN's
`cl_dataset`. Its own scripts count ImageNet by containment; here every task but Grounding is an exact match.

A box of Grounding is [left, top, right, bottom] in shares of the picture padded to a square, as LLaVA pads it; the row
has it in hundredths of the picture itself.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from dmole.data.layouts.base import Dropped, Layout, Rows, box, numbers
from dmole.data.layouts.llava import records, row_of

TASKS = ("ScienceQA", "TextVQA", "ImageNet", "GQA", "VizWiz", "Grounding", "VQAv2", "OCRVQA")


def unpadded(text: str, width: int, height: int) -> str | None:
    """A box of the padded square as a box of the picture; None where the text is no box."""
    found, side = numbers(text), max(width, height)
    if len(found) != 4:
        return None
    edges = [
        (share * side - (side - length) / 2) / length for share, length in zip(found, (width, height) * 2, strict=True)
    ]
    return box(*edges)


def plain_rows(source: Path, split: str, images: Path, *, train: str = "train.json", test: str = "test.json") -> Rows:
    """The rows of one task in CoIN's form."""
    if split == "validation":
        return
    for where, record in records(source / (train if split == "train" else test)):
        yield row_of(record, where)


def _grounding(source: Path, split: str, images: Path) -> Rows:
    if split == "validation":
        return
    for where, record in records(source / f"{split}.json"):
        asked = {**record, "answer": str(record["answer_bbox"])} if "answer_bbox" in record else record
        row = row_of(asked, where)
        if isinstance(row, Dropped) or "messages" in row or len(row["images"]) != 1:
            yield row if isinstance(row, Dropped) else Dropped(where, "not one question about one picture")
            continue
        try:
            with Image.open(images / row["images"][0]) as opened:
                size = opened.size
        except OSError as error:
            yield Dropped(where, f"picture cannot be opened ({type(error).__name__})")
            continue
        found = unpadded(row["answers"][0], *size)
        yield Dropped(where, "answer is no box") if found is None else {**row, "answers": [found]}


LAYOUTS = {
    name: Layout(
        metric="iou" if name == "Grounding" else "exact_match",
        files=f"{name}/train.json, {name}/test.json",
        rows=_grounding if name == "Grounding" else plain_rows,
    )
    for name in TASKS
}
