# SPDX-License-Identifier: Apache-2.0
"""Both image processors: their values by their formulas, whatever else is in the batch, the cache or the process."""

import copy
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from mini_cmit.model.image_processing import CLIP, MiniImageProcessor, PixelImageProcessor
from mini_cmit.model.shipped import MINI_WEIGHTS
from mini_cmit.model.stem import STEM_CHANNELS, EfficientNetLite0


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("DMOLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def mini() -> MiniImageProcessor:
    loaded: MiniImageProcessor = AutoImageProcessor.from_pretrained(MINI_WEIGHTS)
    return loaded


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def noise(seed: int, side: int = 160) -> Image.Image:
    """Smooth noise, so that every channel of the stem has something to say."""
    coarse = np.random.default_rng(seed).integers(0, 256, (10, 10, 3), np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def features(processor: MiniImageProcessor, *images: Any) -> torch.Tensor:
    values: torch.Tensor = processor(list(images), return_tensors="pt")["pixel_values"]
    return values


def entries(cache: Path) -> int:
    return len(list(cache.rglob("*.feature")))


def test_features_are_the_stem_s_standardised_clipped_and_rounded_to_float16(mini: MiniImageProcessor) -> None:
    image = noise(0)
    raw = EfficientNetLite0()(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])
    mean, deviation = (torch.tensor(numbers)[:, None, None] for numbers in (mini.image_mean, mini.image_std))
    expected = ((raw - mean) / deviation).clamp(-5.0, 5.0).half().float()
    got = features(mini, image)
    assert got.dtype == torch.float32 and got.shape == (1, STEM_CHANNELS, 5, 5)
    assert torch.equal(got, expected) and CLIP == 5.0 and bool((got.abs() == 5.0).any())
    assert torch.equal(features(mini, image), got), "read from the cache"


def test_an_image_has_the_same_bits_with_any_batch_mates_and_threads(
    mini: MiniImageProcessor, cache: Path, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    images = [noise(seed) for seed in range(9)]
    torch.set_num_threads(1)
    alone = torch.cat([features(mini, image) for image in images])
    for count in (1, 2):
        torch.set_num_threads(count)
        monkeypatch.setenv("DMOLE_CACHE", str(cache.parent / f"empty{count}"))
        assert torch.equal(features(mini, *images), alone)
        assert torch.get_num_threads() == count
    half_full = cache.parent / "half_full"
    monkeypatch.setenv("DMOLE_CACHE", str(half_full))
    features(mini, *images[::2])
    assert entries(half_full) == 5
    assert torch.equal(features(mini, *reversed(images)), alone.flip(0)) and entries(half_full) == 9


def test_the_content_is_the_key_and_not_the_file(mini: MiniImageProcessor, cache: Path, tmp_path: Path) -> None:
    image = noise(1)
    image.save(tmp_path / "one.png")
    image.save(tmp_path / "two.png", compress_level=1)
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "two.png").read_bytes()
    expected = features(mini, image)
    for same in (Image.open(tmp_path / "one.png"), Image.open(tmp_path / "two.png"), np.array(image)):
        assert torch.equal(features(mini, same), expected)
    assert torch.equal(features(mini, np.moveaxis(np.array(image), -1, 0)), expected) and entries(cache) == 1
    noise(2).save(tmp_path / "one.png")
    assert not torch.equal(features(mini, Image.open(tmp_path / "one.png")), expected) and entries(cache) == 2


def test_other_settings_have_entries_of_their_own(mini: MiniImageProcessor, cache: Path) -> None:
    settings = mini.to_dict()
    shifted = [number + 1.0 for number in settings["image_mean"]]
    other = MiniImageProcessor(**{**settings, "image_mean": shifted})
    image = noise(3)
    assert not torch.equal(features(mini, image), features(other, image)) and entries(cache) == 2
    # A setting of one call counts as well.
    called = mini([image], image_mean=shifted, return_tensors="pt")["pixel_values"]
    assert torch.equal(called, features(other, image)) and entries(cache) == 2
    small = mini([image], size={"height": 96, "width": 96}, return_tensors="pt")["pixel_values"]
    assert small.shape == (1, STEM_CHANNELS, 3, 3)


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "1"])
def test_every_mode_is_read_as_rgb(mode: str) -> None:
    image = noise(4, 20).convert(mode)
    rgb = image.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
    got = PixelImageProcessor()([image], return_tensors="pt")["pixel_values"]
    assert torch.equal(got, PixelImageProcessor()([rgb], return_tensors="pt")["pixel_values"])


def test_pixels_are_scaled_to_plus_and_minus_one() -> None:
    image = Image.new("RGB", (16, 16), (0, 51, 255))
    got = PixelImageProcessor()(image, return_tensors="pt")["pixel_values"]
    assert got.shape == (1, 3, 16, 16) and got.dtype == torch.float32
    assert got[0, :, 7, 7].tolist() == [-1.0, float(torch.tensor(51 / 127.5 - 1.0)), 1.0]
    as_arrays = PixelImageProcessor()([image, image])["pixel_values"]
    assert isinstance(as_arrays, np.ndarray) and as_arrays.shape == (2, 3, 16, 16)


@pytest.mark.parametrize("processor", ["mini", "pixels"])
def test_a_default_device_changes_nothing(processor: str, mini: MiniImageProcessor) -> None:
    chosen = mini if processor == "mini" else PixelImageProcessor()
    expected = chosen([noise(5)], return_tensors="pt")["pixel_values"]
    with torch.device("meta"):
        got = chosen([noise(5)], return_tensors="pt")["pixel_values"]
    assert got.device.type == "cpu" and torch.equal(got, expected)


def test_settings_survive_files_copies_and_processes(mini: MiniImageProcessor, tmp_path: Path) -> None:
    features(mini, noise(6))  # a processor that has been used
    mini.save_pretrained(tmp_path)
    for same in (AutoImageProcessor.from_pretrained(tmp_path), copy.deepcopy(mini), pickle.loads(pickle.dumps(mini))):
        assert isinstance(same, MiniImageProcessor) and same.to_dict() == mini.to_dict()
    assert set(mini.to_dict()) == {"image_processor_type", "size", "image_mean", "image_std"}


def test_what_it_cannot_read_is_refused_by_name(mini: MiniImageProcessor) -> None:
    floats = np.zeros((160, 160, 3), np.float32)
    with pytest.raises(ValueError, match=r"got an array of float32 \(160, 160, 3\); expected uint8 \[H, W, 3\]"):
        features(mini, floats)
    with pytest.raises(ValueError, match=re.escape("size: got {'height': 160, 'width': 96}; expected one side")):
        mini([noise(7)], size={"height": 160, "width": 96})
    with pytest.raises(ValueError, match=r"got a side of \(100, 100\); expected a multiple of 32"):
        mini([noise(7)], size={"height": 100, "width": 100})
    with pytest.raises(ValueError, match="image_mean: got 0 numbers; expected 2368, one a channel of the stem"):
        MiniImageProcessor()
