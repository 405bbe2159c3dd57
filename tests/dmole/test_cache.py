# SPDX-License-Identifier: Apache-2.0
"""Image features are computed once per content, processor and settings."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from dmole.cache import ImageFeatureCache, cache_folder


class Counting:
    """Mean colour of an image as a [3, 1, 1] feature; remembers how often it was asked."""

    def __init__(self) -> None:
        self.computed: list[str] = []

    def __call__(self, images: Sequence[Path]) -> Tensor:
        self.computed += [image.name for image in images]
        return torch.stack([torch.tensor(Image.open(image).getpixel((0, 0))).float().view(3, 1, 1) for image in images])


def picture(path: Path, colour: str) -> Path:
    Image.new("RGB", (4, 4), colour).save(path)
    return path


def test_features_come_in_the_order_asked_and_are_computed_once(tmp_path: Path) -> None:
    red, blue = picture(tmp_path / "red.png", "#ff0000"), picture(tmp_path / "blue.png", "#0000ff")
    compute = Counting()
    cache = ImageFeatureCache(tmp_path / "features", "v1", compute)
    features = cache.features([blue, red, blue])
    assert features.dtype == torch.float32 and features.shape == (3, 3, 1, 1)
    assert features[:, 0, 0, 0].tolist() == [0.0, 255.0, 0.0]
    assert ImageFeatureCache(tmp_path / "features", "v1", compute).features([red]).flatten().tolist() == [
        255.0,
        0.0,
        0.0,
    ]
    assert sorted(compute.computed) == ["blue.png", "red.png"]


def test_another_content_or_another_version_is_another_entry(tmp_path: Path) -> None:
    image, compute = picture(tmp_path / "a.png", "#ff0000"), Counting()
    ImageFeatureCache(tmp_path / "features", "v1", compute).features([image])
    ImageFeatureCache(tmp_path / "features", "v2", compute).features([image])
    picture(image, "#00ff00")
    changed = ImageFeatureCache(tmp_path / "features", "v1", compute).features([image])
    assert len(compute.computed) == 3 and changed.flatten().tolist() == [0.0, 255.0, 0.0]


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DMOLE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("DMOLE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "dmole"
