# SPDX-License-Identifier: Apache-2.0
"""Two tasks about plain pictures, drawn into the cache when they are first asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from dmole.cache import cache_folder


def shades(say: Callable[[str], None]) -> Path:
    root = cache_folder() / "shades"
    if root.exists():
        return root
    say(f"drawing shades in {root}")
    for task, words in (("light", ("pale", "grey")), ("colour", ("red", "green"))):
        (root / task).mkdir(parents=True)
        for split, count in (("train", 8), ("test", 4)):
            lines = []
            for i in range(count):
                shade = 100 + 10 * i
                colour = {"pale": (255 - i,) * 3, "grey": (shade,) * 3, "red": (shade, 0, 0), "green": (0, shade, 0)}
                Image.new("RGB", (16, 16), colour[words[i % 2]]).save(root / task / f"{split}{i}.png")
                row = {"id": f"{split}{i}", "image": f"{split}{i}.png", "instruction": "Answer briefly."}
                lines.append(json.dumps({**row, "answers": [words[i % 2]]}))
            (root / task / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    listed = "\n".join(f"  - {{name: {task}, metric: first_word, directory: {task}}}" for task in ("light", "colour"))
    (root / "stream.yaml").write_text(f"name: shades\ntasks:\n{listed}\n", encoding="utf-8")
    return root
