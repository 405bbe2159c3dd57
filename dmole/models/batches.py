# SPDX-License-Identifier: Apache-2.0
"""Samples with and without images in one batch, which many processors refuse.

The two groups are processed apart and joined:

    [B, L, ...] token inputs       rows of both groups, padded to the longer one
    [samples, ...] inputs          zeros for the samples without images (Idefics2, Idefics3)
    images, tiles or patches       as they are: the rows of the samples with images follow each other in order

In some models text attends to images by a mask of its own (Mllama), and text before the first image attends to all
images of its sample, also to those that only pad it. There every sample's images are repeated until all have as many:

    images a, b | c    ->    a b | c c    masks  1 1 | 1 0

which changes no softmax: over k copies of every key it is the softmax over the keys. Samples without an image have
nothing to repeat: such a model adds attention to images in every sample or in none, so batches that mix the two are
refused.

Shape letters: B samples, L tokens, N most images of a sample.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from dmole.models.chat_template import Conversation

Inputs = dict[str, Tensor]

# 1, 2, 3, 4 and 6 images mix; 4 and 5 would be 20 images for every sample.
MOST_IMAGES = 12


def processed_batch(
    process: Callable[[Sequence[Conversation]], Inputs],
    rows: Sequence[Conversation],
    images: Sequence[int],
    *,
    per_sample: Callable[[], frozenset[str]],
    pad_id: int,
    left: bool,
) -> Inputs:
    """`process(rows)` where all samples have images or none has; otherwise both groups, joined in the order of `rows`.

    Args:
        process: conversations -> everything that the processor returns.
        images: how many images each conversation has.
        per_sample: the names of image inputs with one row a sample; asked only for mixed batches.
        pad_id: the id that fills `input_ids`; every other token input is filled with zeros.
        left: pad on the left.
    """
    groups = [[s for s, n in enumerate(images) if n], [s for s, n in enumerate(images) if not n]]
    if not all(groups):
        inputs = process(rows)
        return _with_as_many_images(inputs, images) if len(set(images)) > 1 else inputs
    seen, unseen = (process([rows[s] for s in group]) for group in groups)
    _with_as_many_images(seen, images)
    length = max(part["input_ids"].shape[1] for part in (seen, unseen))
    joined: Inputs = {}
    for name in {**seen, **unseen}:
        parts = (seen.get(name), unseen.get(name))
        given = next(part for part in parts if part is not None)
        if not _of_tokens(given, seen if parts[0] is not None else unseen):
            if parts[1] is not None:
                raise ValueError(
                    f"processor: got {name} for samples without images; expected inputs of tokens only. Put samples "
                    f"with and without images into different batches."
                )
            joined[name] = given
            if name in per_sample():
                joined[name] = given.new_zeros(len(rows), *given.shape[1:])
                joined[name][groups[0]] = given
            continue
        fill = pad_id if name == "input_ids" else 0
        whole = given.new_full((len(rows), length, *given.shape[2:]), fill)
        for group, part in zip(groups, parts, strict=True):
            if part is not None:
                place = slice(length - part.shape[1], None) if left else slice(part.shape[1])
                whole[group, place] = part
        joined[name] = whole
    return joined


def _with_as_many_images(inputs: Inputs, images: Sequence[int]) -> Inputs:
    """Where masks [B, L, N, ...] say which text attends to which images: every sample's images, repeated to as many.

    The masks keep to the first copy. Raises ValueError for samples without images, and for too many copies.
    """
    masks = [name for name, value in inputs.items() if _of_tokens(value, inputs) and value.dim() > 2]
    if not masks:
        return inputs
    most, whole = max(images), math.lcm(*images)
    shape = tuple(inputs[masks[0]].shape)
    if not whole or whole > max(most, MOST_IMAGES) or any(inputs[name].shape[2] != most for name in masks):
        raise ValueError(
            f"processor: got {masks[0]} {shape} for samples with {list(images)} images; expected numbers that all "
            f"divide one of at most {MOST_IMAGES} and none that is 0, since this model's text attends to the images of "
            f"its batch mates. Put them into different batches, or set the batch size to 1 "
            f"(training.per_device_train_batch_size, evaluation.per_device_eval_batch_size)."
        )
    device = inputs["input_ids"].device  # torch's default may be another
    places = torch.tensor([[copy % number for copy in range(whole)] for number in images], device=device)
    samples = torch.arange(len(images), device=device)[:, None]
    repeated: Inputs = {}
    for name, value in inputs.items():
        if name in masks:
            wider = value.new_zeros(*value.shape[:2], whole, *value.shape[3:])
            wider[:, :, :most] = value
            repeated[name] = wider
        elif value.shape[:2] == (len(images), most) and not _of_tokens(value, inputs):
            repeated[name] = value[samples, places]
        else:
            repeated[name] = value
    return repeated


def _of_tokens(value: Tensor, inputs: Inputs) -> bool:
    return not value.is_floating_point() and value.shape[:2] == inputs["input_ids"].shape


@functools.lru_cache(maxsize=16)
def per_sample_inputs(processor: ProcessorMixin, template: str) -> frozenset[str]:
    """Image inputs that have a row for each sample, found on two samples with one and with two small images.

    The number of rows tells: two where they are samples, three or more where they are images, tiles or patches.
    """
    image = {"type": "image", "image": Image.new("RGB", (32, 32))}
    text = {"type": "text", "text": "a"}
    rows = [[{"role": "user", "content": [*[image] * count, text]}] for count in (1, 2)]
    with torch.device("cpu"):
        inputs = cast(Any, processor).apply_chat_template(
            rows, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt", processor_kwargs={"text_kwargs": {"padding": True}},
        )  # fmt: skip
    return frozenset(
        name for name, value in inputs.items() if len(value) == len(rows) and not _of_tokens(value, inputs)
    )
