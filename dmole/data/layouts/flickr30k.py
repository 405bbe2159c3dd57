# SPDX-License-Identifier: Apache-2.0
"""Flickr30k in Karpathy's splits: `dataset_flickr30k.json` with `images`: {filename, split, sentences: {raw}}.

Pictures are in `flickr30k-images/`, `images/` or `Images/`. A row for each caption in training, for each picture
elsewhere.
"""

from __future__ import annotations

from pathlib import Path

from dmole.data.layouts.base import CAPTION, Layout, Rows, first_of, read_json

SPLITS = {"train": "train", "validation": "val", "test": "test"}


def _rows(source: Path, split: str, images: Path) -> Rows:
    folder = first_of(source, "flickr30k-images", "images", "Images").name
    for image in read_json(source / "dataset_flickr30k.json")["images"]:
        if image["split"] != SPLITS[split]:
            continue
        name = image["filename"]
        row = {"images": [f"{folder}/{name}"], "instruction": CAPTION}
        captions = [sentence["raw"] for sentence in image["sentences"]]
        if split != "train":
            yield {"id": name, **row, "answers": captions}
            continue
        for number, caption in enumerate(captions):
            yield {"id": f"{name}-{number}", **row, "answers": [caption]}


LAYOUT = Layout(metric="cider", files="dataset_flickr30k.json, flickr30k-images/", rows=_rows)
