# SPDX-License-Identifier: Apache-2.0
"""TextCaps: `TextCaps_0.1_{train,val}.json` with `data`: {image_id, caption_id, caption_str}; `train_images/`.

A row for each caption in training, for each picture in the test, which is the published `val` (that of `test` has no
captions). The pictures of both are in `train_images`, those of Open Images' training set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dmole.data.layouts.base import CAPTION, Layout, Rows, read_json


def _rows(source: Path, split: str, images: Path) -> Rows:
    if split == "validation":
        return
    records: list[dict[str, Any]] = read_json(source / f"TextCaps_0.1_{'train' if split == 'train' else 'val'}.json")[
        "data"
    ]
    captions: dict[str, list[str]] = {}
    for record in records:
        image = f"train_images/{record['image_id']}.jpg"
        if split == "train":
            key = f"{record['image_id']}-{record['caption_id']}"
            yield {"id": key, "images": [image], "instruction": CAPTION, "answers": [record["caption_str"]]}
        else:
            captions.setdefault(record["image_id"], []).append(record["caption_str"])
    for key, found in captions.items():
        yield {"id": key, "images": [f"train_images/{key}.jpg"], "instruction": CAPTION, "answers": found}


LAYOUT = Layout(metric="cider", files="TextCaps_0.1_train.json, TextCaps_0.1_val.json, train_images/", rows=_rows)
