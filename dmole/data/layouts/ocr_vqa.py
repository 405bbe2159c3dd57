# SPDX-License-Identifier: Apache-2.0
"""OCR-VQA: `dataset.json`, by picture {imageURL, questions, answers, split: 1 train, 2 validation, 3 test}; `images/`.

A picture is `images/<key>` with the ending of its `imageURL`. D-MoLE tests on the published validation split.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from dmole.data.layouts.base import SHORT, Layout, Rows, read_json

SPLITS = {"train": 1, "validation": 2, "test": 3}


def _rows(source: Path, split: str, images: Path) -> Rows:
    for key, record in read_json(source / "dataset.json").items():
        if record["split"] != SPLITS[split]:
            continue
        image = f"images/{key}{PurePosixPath(record['imageURL']).suffix}"
        for number, (question, answer) in enumerate(zip(record["questions"], record["answers"], strict=True)):
            yield {
                "id": f"{key}-{number}",
                "images": [image],
                "instruction": f"{question}\n{SHORT}",
                "answers": [str(answer)],
            }


LAYOUT = Layout(metric="exact_match", files="dataset.json, images/", rows=_rows)
