# SPDX-License-Identifier: Apache-2.0
"""UCIT (HiDe-LLaVA): `<task>/train*.json` and `<task>/test_3000.json` in CoIN's form, in the order of its schedule.

The folder `instructions` is the source; images are below `--images`, its `datasets`. The captions of the two caption
tasks' tests are in `val_coco_type_3000.json`, whose `image_id` counts the questions of the test from 1. Its own
scripts count an answer as right that is contained in the reference; here it is an exact match.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from dmole.data.layouts.base import Dropped, Layout, Rows, read_json
from dmole.data.layouts.coin import plain_rows

TEST = "test_3000.json"
CAPTIONS = "val_coco_type_3000.json"
# By task: its folder and the file of its training rows.
TASKS = {
    "ImageNet-R": ("ImageNet-R", "train.json"),
    "ArxivQA": ("ArxivQA", "train_4w.json"),
    "VizWiz-Caption": ("VizWiz", "train.json"),
    "IconQA": ("IconQA", "train.json"),
    "CLEVR-Math": ("CLEVR", "train_4w.json"),
    "Flickr30k": ("Flickr30k", "train_brief_4w.json"),
}
CAPTIONED = ("VizWiz-Caption", "Flickr30k")


def _captions(source: Path, split: str, images: Path, *, train: str) -> Rows:
    rows = plain_rows(source, split, images, train=train, test=TEST)
    if split != "test":
        yield from rows
        return
    captions: dict[int, list[str]] = {}
    for annotation in read_json(source / CAPTIONS)["annotations"]:
        captions.setdefault(int(annotation["image_id"]), []).append(annotation["caption"])
    for number, row in enumerate(rows, start=1):
        if isinstance(row, Dropped):
            yield row
        elif number in captions:
            yield {**row, "answers": captions[number]}
        else:
            yield Dropped(f"{TEST}[{number - 1}]", f"no captions in {CAPTIONS}")


LAYOUTS = {
    name: Layout(
        metric="cider" if name in CAPTIONED else "exact_match",
        files=f"{folder}/{train}, {folder}/{TEST}" + (f", {folder}/{CAPTIONS}" if name in CAPTIONED else ""),
        rows=partial(_captions, train=train) if name in CAPTIONED else partial(plain_rows, train=train, test=TEST),
    )
    for name, (folder, train) in TASKS.items()
}
FOLDERS = {name: folder for name, (folder, _) in TASKS.items()}
