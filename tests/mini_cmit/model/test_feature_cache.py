# SPDX-License-Identifier: Apache-2.0
"""Image features are computed once per content, processor, settings and arithmetic; each alone and with one thread."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mini_cmit.model.feature_cache import ImageFeatureCache


class Counting:
    """Mean colour of an image as a [3, 1, 1] feature; remembers how often it was asked, and with how many threads."""

    def __init__(self) -> None:
        self.computed: list[tuple[int, ...]] = []
        self.threads: set[int] = set()

    def __call__(self, image: np.ndarray) -> Tensor:
        self.computed.append(tuple(image[0, 0].tolist()))
        self.threads.add(torch.get_num_threads())
        return torch.from_numpy(image[0, 0].copy()).float().view(3, 1, 1)


def picture(*colour: int) -> np.ndarray:
    return np.full((4, 4, 3), colour, np.uint8)


RED, GREEN, BLUE = picture(255, 0, 0), picture(0, 255, 0), picture(0, 0, 255)


def test_features_come_in_the_order_asked_and_are_computed_once(tmp_path: Path) -> None:
    compute = Counting()
    cache = ImageFeatureCache(tmp_path / "features", "v1", compute)
    features = cache.features([BLUE, RED.copy(), BLUE.copy()])
    assert features.dtype == torch.float32 and features.shape == (3, 3, 1, 1)
    assert features[:, 0, 0, 0].tolist() == [0.0, 255.0, 0.0]
    assert ImageFeatureCache(tmp_path / "features", "v1", compute).features([RED]).flatten().tolist() == [
        255.0,
        0.0,
        0.0,
    ]
    assert sorted(compute.computed) == [(0, 0, 255), (255, 0, 0)]


def test_features_are_computed_with_one_thread_and_the_number_before_is_put_back(tmp_path: Path) -> None:
    images = [picture(i, 0, 0) for i in range(9)]
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
    image = RED
    cache = ImageFeatureCache(tmp_path / "features", "v1", lambda _: torch.rand(4, 5, 6).permute(2, 0, 1))
    computed, read = cache.features([image, image]), cache.features([image, image])
    assert torch.equal(computed, read)
    assert computed.stride() == read.stride() == (120, 20, 5, 1)


def test_another_content_another_shape_or_another_version_is_another_entry(tmp_path: Path) -> None:
    compute = Counting()
    ImageFeatureCache(tmp_path / "features", "v1", compute).features([RED])
    second = ImageFeatureCache(tmp_path / "features", "v2", compute)
    second.features([RED])
    assert second.features([GREEN]).flatten().tolist() == [0.0, 255.0, 0.0]
    second.features([RED.reshape(2, 8, 3)])  # the same bytes
    assert len(compute.computed) == 4


def test_another_arithmetic_is_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that two machines share: neither reads what the other's CPU computed."""
    image, compute = RED, Counting()
    cache = ImageFeatureCache(tmp_path / "features", "v1", compute)
    cache.features([image])
    monkeypatch.setattr("mini_cmit.model.feature_cache.arithmetic", lambda: "another CPU")
    cache.features([image])
    monkeypatch.undo()
    cache.features([image])
    assert len(compute.computed) == 2


@pytest.mark.parametrize("damage", ["cut", "edited", "empty"])
def test_a_damaged_entry_is_computed_again(damage: str, tmp_path: Path) -> None:
    image, compute = RED, Counting()
    cache = ImageFeatureCache(tmp_path / "features", "v1", compute)
    cache.features([image])
    (file,) = (tmp_path / "features").rglob("*.feature")
    good = file.read_bytes()
    file.write_bytes({"cut": good[:-1], "edited": good[:-1] + bytes([good[-1] ^ 1]), "empty": b""}[damage])
    assert cache.features([image]).flatten().tolist() == [255.0, 0.0, 0.0]
    assert len(compute.computed) == 2 and file.read_bytes() == good
    assert [path for path in (tmp_path / "features").rglob("*") if path.is_file()] == [file]
