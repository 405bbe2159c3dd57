# SPDX-License-Identifier: Apache-2.0
"""Image features are computed once per content, processor, settings and arithmetic; each alone and with one thread."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from dmole.cache import ImageFeatureCache, cache_folder


class Counting:
    """Mean colour of an image as a [3, 1, 1] feature; remembers how often it was asked, and with how many threads."""

    def __init__(self) -> None:
        self.computed: list[str] = []
        self.threads: set[int] = set()

    def __call__(self, image: Path) -> Tensor:
        self.computed.append(image.name)
        self.threads.add(torch.get_num_threads())
        return torch.tensor(Image.open(image).getpixel((0, 0))).float().view(3, 1, 1)


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


def test_features_are_computed_with_one_thread_and_the_number_before_is_put_back(tmp_path: Path) -> None:
    images = [picture(tmp_path / f"{i}.png", f"#{i:02x}0000") for i in range(9)]
    before, compute = torch.get_num_threads(), Counting()
    try:
        torch.set_num_threads(3)
        cache = ImageFeatureCache(tmp_path / "features", "v1", compute)
        assert cache.features(images)[:, 0, 0, 0].tolist() == list(range(9))
        assert compute.threads == {1} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_computed_features_have_the_layout_of_read_ones(tmp_path: Path) -> None:
    """The stem's maps have their channels last; a convolution chooses its algorithm by the layout."""
    image = picture(tmp_path / "a.png", "#ff0000")
    cache = ImageFeatureCache(tmp_path / "features", "v1", lambda _: torch.rand(4, 5, 6).permute(2, 0, 1))
    computed, read = cache.features([image, image]), cache.features([image, image])
    assert torch.equal(computed, read)
    assert computed.stride() == read.stride() == (120, 20, 5, 1)


def test_another_content_or_another_version_is_another_entry(tmp_path: Path) -> None:
    image, compute = picture(tmp_path / "a.png", "#ff0000"), Counting()
    ImageFeatureCache(tmp_path / "features", "v1", compute).features([image])
    second = ImageFeatureCache(tmp_path / "features", lambda: "v2", compute)
    second.features([image])
    picture(image, "#00ff00")
    assert second.features([image]).flatten().tolist() == [0.0, 255.0, 0.0]
    assert len(compute.computed) == 3


def test_another_arithmetic_is_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that two machines share: neither reads what the other's CPU computed."""
    image, compute = picture(tmp_path / "a.png", "#ff0000"), Counting()
    cache = ImageFeatureCache(tmp_path / "features", "v1", compute)
    cache.features([image])
    monkeypatch.setattr("dmole.cache.arithmetic", lambda: "another CPU")
    cache.features([image])
    monkeypatch.undo()
    cache.features([image])
    assert len(compute.computed) == 2


@pytest.mark.parametrize("damage", ["cut", "edited", "empty"])
def test_a_damaged_entry_is_computed_again(damage: str, tmp_path: Path) -> None:
    image, compute = picture(tmp_path / "a.png", "#ff0000"), Counting()
    cache = ImageFeatureCache(tmp_path / "features", "v1", compute)
    cache.features([image])
    (file,) = (tmp_path / "features").rglob("*.feature")
    good = file.read_bytes()
    file.write_bytes({"cut": good[:-1], "edited": good[:-1] + bytes([good[-1] ^ 1]), "empty": b""}[damage])
    assert cache.features([image]).flatten().tolist() == [255.0, 0.0, 0.0]
    assert len(compute.computed) == 2 and file.read_bytes() == good
    assert [path for path in (tmp_path / "features").rglob("*") if path.is_file()] == [file]


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DMOLE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("DMOLE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "dmole"
