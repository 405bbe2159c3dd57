# SPDX-License-Identifier: Apache-2.0
"""KVQA: `dataset.json`, by picture {imgPath, Questions, Answers, NamedEntities, split}; pictures in `KVQAimgs/`.

`split` has one number for each of the published partitions: 1 train, 2 validation, 3 test. The first partition is
taken. The names of the people shown are the rows' `entities`, for the leak check.
"""

from __future__ import annotations

from pathlib import Path

from dmole.data.layouts.base import SHORT, Dropped, Layout, Rows, read_json

SPLITS = {"train": 1, "validation": 2, "test": 3}


def _rows(source: Path, split: str, images: Path) -> Rows:
    for key, record in read_json(source / "dataset.json").items():
        parts = record.get("split")
        part = parts[0] if isinstance(parts, list) and parts else parts
        if part not in SPLITS.values():
            if split == "train":
                yield Dropped(key, f"split is {parts!r}, which names no part")
            continue
        if part != SPLITS[split]:
            continue
        for number, (question, answer) in enumerate(zip(record["Questions"], record["Answers"], strict=True)):
            yield {
                "id": f"{key}-{number}",
                "images": [record["imgPath"]],
                "instruction": f"{question}\n{SHORT}",
                "answers": [str(answer)],
                "entities": [name for name in record.get("NamedEntities", []) if name],
            }


LAYOUT = Layout(metric="exact_match", files="dataset.json, KVQAimgs/", rows=_rows)
