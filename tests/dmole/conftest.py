# SPDX-License-Identifier: Apache-2.0
"""A stream of three tasks with pictures of 16 pixels, small enough for a whole run in about a second."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dmole.config import RunConfig, load_config
from dmole.data.reading import read_stream
from dmole.data.sample import Stream
from dmole.models.vision_language import VisionLanguageModel
from mini_cmit.model.tiny import build_tiny_model

TASKS = (
    ("colours", "exact_match", "Answer briefly. red or green"),
    ("letters", "option_letter", "Answer with the letter. A red B green"),
    ("captions", "cider", "Describe the image in one sentence."),
)


def write_toy_stream(root: Path, *, train: int = 10, test: int = 4, validation: int = 0) -> Path:
    """Three tasks about plain red and green pictures, written in the package's own format."""
    chance = random.Random(0)
    # No picture twice: `dmole tasks check` finds those that a test split shares with others.
    used: set[tuple[bool, int]] = set()
    listed = [f"  - {{name: {name}, metric: {metric}, directory: {name}}}" for name, metric, _ in TASKS]
    root.mkdir(parents=True, exist_ok=True)
    (root / "stream.yaml").write_text("name: toy\ntasks:\n" + "\n".join(listed) + "\n")
    for name, metric, instruction in TASKS:
        (root / name).mkdir()
        for split, count in (("train", train), ("test", test), ("validation", validation)):
            if not count:
                continue
            lines = []
            for number in range(count):
                red = chance.random() < 0.5
                shade = chance.randrange(100, 255)
                while (red, shade) in used:
                    shade = 100 + (shade - 99) % 155
                used.add((red, shade))
                image = root / name / f"{split}{number}.png"
                Image.new("RGB", (16, 16), (shade, 0, 0) if red else (0, shade, 0)).save(image)
                answer = {"exact_match": "red green", "option_letter": "A B"}.get(metric, "image red|image green")
                choices = answer.split("|" if "|" in answer else " ")
                row: dict[str, Any] = {
                    "id": f"{name}-{split}-{number}",
                    "image": image.name,
                    "instruction": instruction + " yes" * chance.randrange(4),
                    "answers": [choices[0 if red else 1]],
                }
                if metric == "option_letter":
                    row["options"] = ["red", "green"]
                lines.append(json.dumps(row))
            (root / name / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_stream(tmp_path_factory.mktemp("toy") / "stream")


@pytest.fixture(scope="session")
def toy_stream(toy_folder: Path) -> Stream:
    return read_stream(toy_folder)


@pytest.fixture(scope="session")
def validated_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy stream with six validation samples a task."""
    return write_toy_stream(tmp_path_factory.mktemp("validated") / "stream", validation=6)


@pytest.fixture(scope="session")
def validated_stream(validated_folder: Path) -> Stream:
    return read_stream(validated_folder)


@pytest.fixture
def tiny_model() -> VisionLanguageModel:
    return build_tiny_model(0)


@pytest.fixture
def toy_config(toy_folder: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """`toy_config("seeds=[0, 1]", ...)`: the toy stream, the tiny model, results below tmp_path."""

    def make(*overrides: str) -> RunConfig:
        return load_config(
            overrides=(
                f"stream={toy_folder}",
                "model=tiny",
                "methods=[dmole, seq_ft]",
                f"output={tmp_path / 'out'}",
                "threads=1",
                "training.num_train_epochs=1",
                "training.per_device_train_batch_size=4",
                "evaluation.per_device_eval_batch_size=8",
                "evaluation.max_new_tokens=3",
                "lora.rank=4",
                "dmole.proxy_min_samples=4",
                "dmole.router.epochs=3",
                *overrides,
            )
        )

    return make
