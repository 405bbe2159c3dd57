# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dmole.models.batches import processed_batch

# Two samples with one and two images, one sample without; each conversation is a number.
ROWS: list[Any] = [[1], [0], [2]]
IMAGES = [1, 0, 2]


def process(rows: Sequence[Any]) -> dict[str, Tensor]:
    """Ids as long as the group's longest sample; pixels flat over images, and once more padded to samples."""
    counts = [row[0] for row in rows]
    ids = torch.tensor([[9] * (1 + n) + [0] * (max(counts) - n) for n in counts])
    if not any(counts):
        return {"input_ids": ids, "token_type_ids": ids * 0 + 3}
    return {
        "input_ids": ids,
        "token_type_ids": ids * 0 + 3,
        "flat": torch.arange(sum(counts) * 2.0).view(-1, 2),
        "padded": torch.arange(1, 1 + 2.0 * len(counts)).view(-1, 2),
    }


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_groups_are_joined_in_the_order_of_the_samples(left: bool) -> None:
    joined = processed_batch(process, ROWS, IMAGES, per_sample=lambda: frozenset({"padded"}), pad_id=7, left=left)
    alone = [7, 7, 9] if left else [9, 7, 7]
    assert joined["input_ids"].tolist() == [[9, 9, 0], alone, [9, 9, 9]]
    assert joined["token_type_ids"].tolist()[1] == ([0, 0, 3] if left else [3, 0, 0])
    assert joined["flat"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert joined["padded"].tolist() == [[1, 2], [0, 0], [3, 4]]


@pytest.mark.parametrize("kept", [[0, 2], [1]], ids=["all_have_images", "none_has"])
def test_one_group_is_one_call(kept: list[int]) -> None:
    calls = []

    def counted(rows: Sequence[Any]) -> dict[str, Tensor]:
        calls.append(len(rows))
        return process(rows)

    some = [ROWS[i] for i in kept]
    processed_batch(counted, some, [IMAGES[i] for i in kept], per_sample=frozenset, pad_id=7, left=False)
    assert calls == [len(kept)]


def test_image_inputs_of_samples_without_images_are_refused() -> None:
    def filled(rows: Sequence[Any]) -> dict[str, Tensor]:
        return {**process(rows), "flat": torch.zeros(1, 2)}

    with pytest.raises(ValueError, match="processor: got flat for samples without images; expected inputs of tokens"):
        processed_batch(filled, ROWS, IMAGES, per_sample=frozenset, pad_id=7, left=False)
