# SPDX-License-Identifier: Apache-2.0
"""One picture of sixteen samples per task, with what is asked and answered: look at it before believing a score."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Final

import matplotlib
from PIL import Image, ImageDraw, ImageFont

COLUMNS: Final = 4
ROWS: Final = 4
CELL_WIDTH: Final = 300
TEXT_HEIGHT: Final = 118
LETTERS_PER_LINE: Final = 46


def contact_sheet(folder: Path, task: str, *, split: str = "train") -> Image.Image:
    """Sixteen samples spread evenly over one split of a task of the stream in `folder`."""
    file = Path(folder) / task / f"{split}.jsonl"
    if not file.is_file():
        raise ValueError(f"there is no {file.name} of task {task!r} below the stream's folder. Build the stream first.")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    chosen = rows[:: max(1, len(rows) // (COLUMNS * ROWS))][: COLUMNS * ROWS]
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 11)
    images = [Image.open(file.parent / row["image"]).convert("RGB") for row in chosen]
    height = max(image.height for image in images) + TEXT_HEIGHT + 12
    sheet = Image.new("RGB", (COLUMNS * CELL_WIDTH, ROWS * height), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (row, image) in enumerate(zip(chosen, images, strict=True)):
        left, top = place % COLUMNS * CELL_WIDTH + 6, place // COLUMNS * height + 6
        sheet.paste(image, (left, top))
        asked = textwrap.wrap(row["instruction"].replace("\n", " | "), LETTERS_PER_LINE)
        answered = textwrap.wrap(" / ".join(dict.fromkeys(row["answers"])), LETTERS_PER_LINE)
        pen.multiline_text((left, top + image.height + 3), "\n".join(asked[:4]), font=font, fill="#555555")
        below = top + image.height + 5 + 14 * len(asked[:4])
        pen.multiline_text((left, below), "\n".join(answered[:4]), font=font, fill="#b00000")
    return sheet


def write_contact_sheets(folder: Path, output: Path, *, split: str = "train") -> list[Path]:
    """Writes `<task>.png` below `output` for every task folder of the stream; returns the files."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for file in sorted(Path(folder).glob(f"*/{split}.jsonl")):
        target = output / f"{file.parent.name}.png"
        contact_sheet(folder, file.parent.name, split=split).save(target)
        written.append(target)
    return written
