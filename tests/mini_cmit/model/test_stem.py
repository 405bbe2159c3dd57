# SPDX-License-Identifier: Apache-2.0
"""The stem is the network that its weights belong to: it names two real photographs rightly."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from mini_cmit.model.stem import STEM_CHANNELS, EfficientNetLite0


@pytest.fixture(scope="module")
def stem() -> EfficientNetLite0:
    return EfficientNetLite0()


def photograph(name: str, side: int) -> torch.Tensor:
    image = Image.fromarray(load_sample_image(name))
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    square = image.crop((left, top, left + edge, top + edge)).resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]


@pytest.mark.parametrize(("name", "imagenet_class"), [("china.jpg", 698), ("flower.jpg", 985)], ids=["palace", "daisy"])
def test_the_stem_names_a_photograph(stem: EfficientNetLite0, name: str, imagenet_class: int) -> None:
    assert int(stem.logits(photograph(name, 224)).argmax()) == imagenet_class


def test_the_map_joins_three_depths(stem: EfficientNetLite0) -> None:
    images = photograph("china.jpg", 160)
    features = stem(images)
    assert features.shape == (1, STEM_CHANNELS, 5, 5) and features.dtype == torch.float32
    assert torch.equal(stem(images.repeat(2, 1, 1, 1))[1], stem(images.repeat(2, 1, 1, 1))[0])


def test_bits_depend_on_the_image_alone(stem: EfficientNetLite0) -> None:
    """Where images share a batch, batches of 16 and more and other thread counts give other bits (measured)."""
    whole = photograph("china.jpg", 512)[0]
    images = torch.stack([whole[:, 8 * i : 8 * i + 160, 20 * i : 20 * i + 160] for i in range(17)])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([stem(image[None]) for image in images])
        torch.set_num_threads(2)
        assert torch.equal(stem(images), alone)
        assert torch.equal(stem(images[3:6]), alone[3:6])
        assert torch.equal(stem(images.contiguous(memory_format=torch.channels_last)), alone)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(stem(images[:2]), alone[:2])
        with ThreadPoolExecutor(2) as pool:
            assert torch.equal(torch.cat(list(pool.map(stem, images.split(5)))), alone)  # type: ignore[no-untyped-call]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.zeros(1, 3, 160, 160),
            r"images: got torch.float32 \(1, 3, 160, 160\); expected uint8 \[B, 3, S, S\] RGB",
        ),
        (torch.zeros(1, 3, 100, 100, dtype=torch.uint8), r"got a side of \(100, 100\); expected a multiple of 32"),
    ],
    ids=["float", "side"],
)
def test_wrong_images_are_refused(stem: EfficientNetLite0, images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stem(images)
