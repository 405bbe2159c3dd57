# SPDX-License-Identifier: Apache-2.0
"""Samples with and without images in one batch, which many processors refuse.

The two groups are processed apart and joined:

    [B, L, ...] token inputs       rows of both groups, padded to the longer one
    [samples, ...] inputs          zeros for the samples without images (Idefics2, Idefics3)
    images, tiles or patches       as they are: the rows of the samples with images follow each other in order

Models in which text attends to images by a mask of its own (Mllama) cannot mix the groups, and are refused.

Shape letters: B samples, L tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from dmole.models.chat_template import Conversation

Inputs = dict[str, Tensor]


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
        return process(rows)
    seen, unseen = (process([rows[s] for s in group]) for group in groups)
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
        if given.dim() > 2 and None in parts:
            # Mllama: rows of its mask without an image attend to every image of the batch.
            raise ValueError(
                f"processor: got {name} {tuple(given.shape)}, by which text attends to images; expected samples with "
                f"and without images apart, since such a model mixes them up. Put them into different batches."
            )
        fill = pad_id if name == "input_ids" else 0
        whole = given.new_full((len(rows), length, *given.shape[2:]), fill)
        for group, part in zip(groups, parts, strict=True):
            if part is not None:
                place = slice(length - part.shape[1], None) if left else slice(part.shape[1])
                whole[group, place] = part
        joined[name] = whole
    return joined


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
