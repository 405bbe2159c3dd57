# SPDX-License-Identifier: Apache-2.0
"""VizWiz-Caption: `annotations/{train,val}.json` in COCO's form, pictures in `train/` and `val/`.

A row for each caption in training, for each picture in the test, which is the published `val` (that of `test` has no
captions). Captions that annotators rejected are kept, as D-MoLE's counts ask (5 for each picture).
"""

from __future__ import annotations

from pathlib import Path

from dmole.data.layouts.base import CAPTION, Dropped, Layout, Rows, first_of, read_json


def _rows(source: Path, split: str, images: Path) -> Rows:
    if split == "validation":
        return
    name = "train" if split == "train" else "val"
    document = read_json(first_of(source, f"annotations/{name}.json", f"{name}.json"))
    captions: dict[int, list[str]] = {}
    for annotation in document["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    for image in document["images"]:
        found = captions.get(image["id"], [])
        row = {"images": [f"{name}/{image['file_name']}"], "instruction": CAPTION}
        if not found:
            yield Dropped(image["file_name"], "picture without a caption")
        elif split == "train":
            for number, caption in enumerate(found):
                yield {"id": f"{image['file_name']}-{number}", **row, "answers": [caption]}
        else:
            yield {"id": image["file_name"], **row, "answers": found}


LAYOUT = Layout(metric="cider", files="annotations/train.json, annotations/val.json, train/, val/", rows=_rows)
