# SPDX-License-Identifier: Apache-2.0
"""VizWiz-VQA: `Annotations/{train,val}.json`, a list of {image, question, answers: ten of {answer}}; `train/`, `val/`.

What is taught is the answer that most annotators gave, the first of them where several are as frequent.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from dmole.data.layouts.base import SHORT, Layout, Rows, first_of, read_json

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


def _rows(source: Path, split: str, images: Path) -> Rows:
    if split == "validation":
        return
    name = "train" if split == "train" else "val"
    file = first_of(source, f"Annotations/{name}.json", f"annotations/{name}.json", f"{name}.json")
    for record in read_json(file):
        given = [answer["answer"] for answer in record["answers"]]
        most = Counter(given).most_common(1)[0][0] if given else None
        rest = list(given)
        if most is not None:
            rest.remove(most)
        yield {
            "id": record["image"],
            "images": [f"{name}/{record['image']}"],
            "instruction": f"{record['question']}\n{UNANSWERABLE} {SHORT}",
            "answers": [] if most is None else [most, *rest],
        }


LAYOUT = Layout(metric="vqa", files="Annotations/train.json, Annotations/val.json, train/, val/", rows=_rows)
