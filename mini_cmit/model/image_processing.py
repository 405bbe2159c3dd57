# SPDX-License-Identifier: Apache-2.0
"""Image processors in transformers' form: the mini model's stem features, and plain pixels for the tiny model.

    image -> RGB [S, S], bicubic where it has another size -> stem [2368, S/32, S/32] -> clip((x - mean) / deviation, 5)
    image -> RGB [S, S], bicubic where it has another size -> x / 127.5 - 1

Both are found by `AutoImageProcessor` after ``import mini_cmit`` and hold nothing but settings.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import SizeDict

from dmole.cache import cache_folder
from mini_cmit.model.feature_cache import ImageFeatureCache
from mini_cmit.model.stem import STEM_CHANNELS, EfficientNetLite0, stem_digest

CLIP = 5.0


class SquareImageProcessor(BaseImageProcessor):
    """What both processors do to an image before anything else; subclasses name their settings and do the rest."""

    SETTINGS: tuple[str, ...] = ("size",)

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)  # type: ignore[no-untyped-call]

    def process_image(self, image: Any, *, size: SizeDict, **_: Any) -> np.ndarray:
        """RGB uint8 [S, S, 3] of a PIL image, or of a uint8 array [H, W, 3] or [3, H, W]."""
        if size.height is None or size.height != size.width:
            raise ValueError(
                f"size: got {dict(size)}; expected one side for height and width. The model reads square images."
            )
        return square_rgb(image if isinstance(image, Image.Image) else _from_array(image), size.height)

    def to_dict(self) -> dict[str, Any]:
        """The settings alone, as JSON holds them."""
        plain = {name: getattr(self, name) for name in self.SETTINGS}
        plain = {
            name: dict(value) if isinstance(value, SizeDict) else list(value) if isinstance(value, tuple) else value
            for name, value in plain.items()
        }
        return {"image_processor_type": type(self).__name__, **plain}


class MiniImageProcessor(SquareImageProcessor):
    """Image -> standardised stem features [2368, S/32, S/32] (``mini_cmit.model.stem``), cached on disk.

    Standardised per channel with the mean and deviation over the pretraining images: the three depths that the map
    joins differ by an order of magnitude, and one of them would otherwise drown the others. Clipped at five deviations:
    the network's channels are sparse, and single values of sixty would decide the first layer's output.

    Args:
        size: ``{"height": S, "width": S}``, S a multiple of 32.
        image_mean, image_std: 2368 numbers each; exact in float32.
    """

    SETTINGS = ("size", "image_mean", "image_std")
    size = {"height": 160, "width": 160}
    image_mean: tuple[float, ...] = ()
    image_std: tuple[float, ...] = ()

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        for name in ("image_mean", "image_std"):
            held = getattr(self, name)
            if len(held) != STEM_CHANNELS:
                raise ValueError(
                    f"{name}: got {len(held)} numbers; expected {STEM_CHANNELS}, one a channel of the stem. Load the "
                    f"processor from the model's folder."
                )

    def _preprocess(
        self,
        images: Sequence[np.ndarray],
        *,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        return_tensors: str | None = None,
        **_: Any,
    ) -> BatchFeature:
        mean, deviation = _channels(image_mean), _channels(image_std)

        def compute(pixels_HWC: np.ndarray) -> Tensor:
            image_1CHW = torch.from_numpy(pixels_HWC.copy()).permute(2, 0, 1)[None]
            return standardise(_stem()(image_1CHW), mean, deviation)[0]

        cache = ImageFeatureCache(cache_folder() / "stem_features", _made_by(mean, deviation), compute)
        return BatchFeature({"pixel_values": cache.features(images).numpy()}, tensor_type=return_tensors)

    def standardise(self, features_BCHW: Tensor) -> Tensor:
        """Raw stem features -> what the model reads."""
        return standardise(features_BCHW, _channels(self.image_mean), _channels(self.image_std))


class PixelImageProcessor(SquareImageProcessor):
    """Image -> pixels [3, S, S] scaled to -1..1: the plain processor of a model that learns from pixels."""

    size = {"height": 16, "width": 16}

    def _preprocess(self, images: Sequence[np.ndarray], *, return_tensors: str | None = None, **_: Any) -> BatchFeature:
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
        return BatchFeature({"pixel_values": pixels.numpy()}, tensor_type=return_tensors)


def square_rgb(image: Image.Image, side: int) -> np.ndarray:
    """RGB uint8 [side, side, 3]; bicubic when the image has another size."""
    rgb = image.convert("RGB")
    return np.asarray(rgb if rgb.size == (side, side) else rgb.resize((side, side), Image.Resampling.BICUBIC))


def standardise(features_BCHW: Tensor, mean_C: Tensor, deviation_C: Tensor) -> Tensor:
    """(x - mean) / deviation per channel, clipped at five deviations."""
    return ((features_BCHW - mean_C[:, None, None]) / deviation_C[:, None, None]).clamp_(-CLIP, CLIP)


def _channels(numbers: Sequence[float]) -> Tensor:
    # Whatever the default device and dtype are.
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")


def _from_array(image: Any) -> Image.Image:
    pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.shape[2] != 3:
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(
            f"images: got an array of {pixels.dtype} {pixels.shape}; expected uint8 [H, W, 3] or [3, H, W]. Give a PIL "
            f"image instead."
        )
    return Image.fromarray(pixels)


@functools.cache
def _stem() -> EfficientNetLite0:
    # Two threads may both get here and load it twice; the weights are the same.
    return EfficientNetLite0()


@functools.cache
def _code() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _made_by(mean: Tensor, deviation: Tensor) -> str:
    """What cached features follow from besides pixels and arithmetic."""
    statistics = hashlib.sha256(mean.numpy().tobytes() + deviation.numpy().tobytes()).hexdigest()
    return json.dumps(["efficientnet-lite0", CLIP, statistics, stem_digest(), _code()])
