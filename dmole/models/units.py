# SPDX-License-Identifier: Apache-2.0
"""
    rows of sample s  =  the next L * units[s] / sum(units) rows of a layer whose leading dimension is L

How much of a tower's input belongs to each sample: the `units` of `dmole_kernels.ExpertGates.use`. The language tower
has one unit a sample. Rows of the vision tower are images, tiles, windows or the flat patches of the whole batch, in
the order of the samples; which of them is said by a rule:

    images   units[s] = number of the sample's images                every image has as many rows
    tokens   units[s] = number of image tokens in input_ids[s]       rows in proportion to tokens
    tiles    units[s] = tiles of the sample's images                 as `config.image_grid_pinpoints` cuts them
    padded   units[s] = 1                                            the tower gets as many images for every sample

    2 images, 0, 1; L = 3                    images    [2, 0, 1]        rows 0 and 1, none, row 2
    48 + 16 tokens, 0, 32; L = 384 patches   tokens    [64, 0, 32]      rows 0 to 255, none, 256 to 383

"auto" measures L: a forward that is left at the first candidate of the tower. Where L is the number of images, rows are
images, else tokens. A leading dimension as long as the batch is never taken for samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from dmole.models.declaration import Rows

Images = Sequence[int]


def vision_units(
    rows: Rows,
    *,
    images: Images,
    inputs: Mapping[str, Any],
    image_token_id: int | None,
    config: Any,
    length: int | None,
) -> list[int]:
    """The vision tower's units, one number for each sample.

    Args:
        images: how many images each sample has.
        inputs: everything that the processor returned; `input_ids` is [samples, tokens].
        length: L of the tower's first candidate in this batch; needed for "auto" alone.

    Raises:
        ValueError: where the rule does not fit the batch, with the field to set.
    """
    images = [int(number) for number in images]
    if not sum(images):
        return [0] * len(images)
    if rows == "images":
        return images
    if rows == "padded":
        return [1] * len(images)
    if rows == "tiles":
        return _tiles(images, inputs, config)
    tokens = image_tokens(inputs, image_token_id)
    if rows == "tokens":
        _check_tokens(images, tokens, image_token_id)
        assert tokens is not None
        return tokens
    if length is None:
        raise ValueError("rows: got 'auto' without the number of rows; expected a measured one. Call measured_rows.")
    if length == sum(images):
        return images
    described = f"rows: got {length} rows of the vision tower for {images} images and {tokens} image tokens"
    remedy = "Set declaration.rows to images, tokens, tiles or padded, and check it with `dmole inspect --check`."
    if tokens is None or any(bool(a) != bool(b) for a, b in zip(images, tokens, strict=True)):
        raise ValueError(
            f"{described} (image_token_id {image_token_id}); expected image tokens in the samples with images. "
            f"{remedy} If the token is another one, set declaration.image_token_id."
        )
    if any(length * number % sum(tokens) for number in tokens):
        raise ValueError(f"{described}; expected a whole number of rows for each sample. {remedy}")
    if _may_be_padded(inputs, images, length):
        raise ValueError(
            f"{described}, which is also the batch padded to {max(images)} images a sample; expected to tell these "
            f"apart. {remedy}"
        )
    return tokens


def image_tokens(inputs: Mapping[str, Any], image_token_id: int | None) -> list[int] | None:
    """The image tokens of each sample; None where their id is not known."""
    ids = inputs.get("input_ids")
    if image_token_id is None or not isinstance(ids, Tensor):
        return None
    counts: list[int] = (ids == image_token_id).sum(dim=1).tolist()
    return counts


class _Reached(BaseException):
    """Leaves a forward at the layer whose input was wanted; no `except Exception` on the way may keep it."""


def measured_rows(model: nn.Module, candidates: Iterable[str], inputs: Mapping[str, Any]) -> int:
    """L of the first of `candidates` that a forward of `inputs` reaches; the forward is left there.

    Costs the embeddings, and the layers before the tower. Raises ValueError where no candidate is reached.
    """
    found: list[int] = []

    def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x = arguments[0] if arguments else keywords["input"]
        found.append(leading(x))
        raise _Reached

    handles = [model.get_submodule(n).register_forward_pre_hook(hook, with_kwargs=True) for n in candidates]
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(**inputs)
    except _Reached:
        pass
    finally:
        model.train(mode)
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError(
            "candidates: a forward with images called no candidate of the vision tower; expected the images to pass "
            "through it. Set declaration.vision to the tower that gets the images."
        )
    return found[0]


def leading(x: Tensor) -> int:
    """L of a layer's input [..., features]: its first dimension, or the second one where the first is 1."""
    shape = x.shape[:-1] or (1,)
    return int(shape[1] if shape[0] == 1 and len(shape) > 1 else shape[0])


def rule_of(measured: Sequence[tuple[int, int | None]]) -> Rows:
    """Which rule holds for images of different shapes, of which (rows, image tokens) were measured one by one.

    Raises ValueError where neither the rows nor the rows per token are the same for all.
    """
    lengths = [length for length, _ in measured]
    tokens = [number for _, number in measured]
    if len(set(lengths)) == 1:
        return "images"
    if all(tokens):
        ratios = {Fraction(length, number) for length, number in measured if number}
        if len(ratios) == 1:
            return "tokens"
    raise ValueError(
        f"rows: images of different shapes have {lengths} rows in the vision tower and {tokens} image tokens; expected "
        f"equal rows, or rows in proportion to the tokens. Set declaration.rows to tiles or padded, and check it with "
        f"`dmole inspect --check`."
    )


def _check_tokens(images: Sequence[int], tokens: Sequence[int] | None, image_token_id: int | None) -> None:
    if tokens is None or any(bool(a) != bool(b) for a, b in zip(images, tokens, strict=True)):
        raise ValueError(
            f"declaration.rows: got 'tokens' for {list(images)} images and {tokens} tokens of id {image_token_id}; "
            f"expected image tokens in the samples with images alone. Set declaration.image_token_id, or other rows."
        )


def _may_be_padded(inputs: Mapping[str, Any], images: Sequence[int], length: int) -> bool:
    """Whether the pixels are [samples, most images, ...] and the tower may get all of them, padding too."""
    pixels = inputs.get("pixel_values")
    most = max(images)
    if not isinstance(pixels, Tensor) or pixels.dim() < 5 or min(images) == most:
        return False
    return tuple(pixels.shape[:2]) == (len(images), most) and length % (len(images) * most) == 0


def _tiles(images: Sequence[int], inputs: Mapping[str, Any], config: Any) -> list[int]:
    """Tiles of each sample: the whole image and the parts that `select_best_resolution` makes of it."""
    from transformers.image_processing_utils import select_best_resolution

    sizes, pinpoints = inputs.get("image_sizes"), getattr(config, "image_grid_pinpoints", None)
    side = getattr(getattr(config, "vision_config", None), "image_size", None)
    count = None if sizes is None else len(sizes)
    if count != sum(images) or not pinpoints or not isinstance(side, int):
        raise ValueError(
            f"declaration.rows: got 'tiles' with image_sizes of {count} images for {sum(images)}, image_grid_pinpoints "
            f"{pinpoints} and image_size {side}; expected all three. Set other rows."
        )
    # llava_onevision does not cut the images of a prompt with several; the processor says how many each prompt has.
    numbers = [1] * sum(images) if inputs.get("batch_num_images") is None else inputs["batch_num_images"]
    single = [int(number) == 1 for number in numbers for _ in range(int(number))]
    tiles = []
    for size, cut in zip(torch.as_tensor(sizes).tolist(), single, strict=True):
        height, width = select_best_resolution(size, pinpoints)
        tiles.append(math.ceil(height / side) * math.ceil(width / side) + 1 if cut else 1)
    start, units = 0, []
    for number in images:
        units.append(sum(tiles[start : start + number]))
        start += number
    return units
