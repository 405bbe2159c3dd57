# SPDX-License-Identifier: Apache-2.0
"""SK-VG: `annotations.json` with {train, val, test: [{image_name, knowledge, ref_exp, bbox}]}; pictures in `images/`.

A `bbox` is {x, y, width, height} in pixels, x and y its centre; the row has it in hundredths of the picture's sides,
whose size is read from the file.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from dmole.data.layouts.base import Dropped, Layout, Rows, box, read_json

SPLITS = {"train": "train", "validation": "val", "test": "test"}


def _rows(source: Path, split: str, images: Path) -> Rows:
    for number, record in enumerate(read_json(source / "annotations.json")[SPLITS[split]]):
        image, where = f"images/{record['image_name']}", record["bbox"]
        try:
            with Image.open(images / image) as opened:
                width, height = opened.size
        except OSError as error:
            yield Dropped(image, f"picture cannot be opened ({type(error).__name__})")
            continue
        left, top = where["x"] - where["width"] / 2, where["y"] - where["height"] / 2
        yield {
            "id": str(number),
            "images": [image],
            "instruction": (
                f"Based on the knowledge {record['knowledge']}.\n"
                "Please provide the bounding box coordinate of the region this sentence describes: "
                f"{record['ref_exp']}"
            ),
            "answers": [
                box(left / width, top / height, (left + where["width"]) / width, (top + where["height"]) / height)
            ],
        }


LAYOUT = Layout(metric="iou", files="annotations.json, images/", rows=_rows)
