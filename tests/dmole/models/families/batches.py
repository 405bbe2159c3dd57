# SPDX-License-Identifier: Apache-2.0
"""Batches made by hand, as `dmole.models.prompts.encode` returns them."""

from __future__ import annotations

from collections.abc import Sequence

from dmole.models.contract import Probes
from dmole.models.prompts import IGNORE, Encoded
from tests.kernels.families.tiny import Family

SAMPLES = 3
# Every point that needs no processor.
POINTS = {1, 2, 3, 4, 5, 6, 7, 9}


def encoded(family: Family, owners: Sequence[int]) -> Encoded:
    """Three samples with the images that `owners` gives them; the answer is the last three tokens of each."""
    arguments = family.batch(owners, SAMPLES).arguments
    labels = arguments["input_ids"].clone()
    lengths = arguments["attention_mask"].sum(1).tolist()
    for row, length in zip(labels, lengths, strict=True):
        row[: length - 3] = IGNORE
        row[length:] = IGNORE
    images = tuple(list(owners).count(s) for s in range(SAMPLES))
    prompts = tuple(length - 3 for length in lengths)
    return Encoded(inputs=arguments, labels=labels, images=images, prompt_lengths=prompts)


def probes(family: Family) -> Probes:
    owned = encoded(family, [0, 0, 2])
    return Probes(one_two_one=encoded(family, [0, 1, 1, 2]), two_none_one=owned, prompts=owned)
