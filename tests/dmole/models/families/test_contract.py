# SPDX-License-Identifier: Apache-2.0
"""The contract on a tiny random model of each family: towers, candidates and units come from the rules alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

from dmole.models.contract import Probes, check
from dmole.models.vision_language import VisionLanguageModel, wrap
from tests.kernels.families.tiny import FAMILIES, Family

SAMPLES = 3
# Every point that needs no processor.
POINTS = {1, 2, 3, 4, 5, 6, 7, 9}


@dataclass(frozen=True)
class Encoded:
    """A batch as `dmole.models.prompts.encode` returns it, made by hand."""

    inputs: dict[str, Any]
    labels: Tensor | None
    images: tuple[int, ...]
    units: list[int]  # the vision tower's, written down in tiny.py


def encoded(family: Family, owners: Sequence[int]) -> Encoded:
    batch = family.batch(owners, SAMPLES)
    ids, mask = batch.arguments["input_ids"], batch.arguments["attention_mask"]
    labels = ids.clone()
    for row, length in zip(labels, mask.sum(1).tolist(), strict=True):
        row[: length - 3] = -100
        row[length:] = -100
    return Encoded(batch.arguments, labels, tuple(owners.count(s) for s in range(SAMPLES)), batch.units)


def probes(family: Family) -> Probes:
    owned = encoded(family, [0, 0, 2])
    return Probes(one_two_one=encoded(family, [0, 1, 1, 2]), two_none_one=owned, prompts=owned)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = FAMILIES[request.param]
    return found


@pytest.fixture(scope="module")
def vlm(family: Family) -> VisionLanguageModel:
    return wrap(family.build())


def test_every_point_holds(family: Family, vlm: VisionLanguageModel) -> None:
    findings = check(vlm, probes(family))
    assert [finding for finding in findings if not finding.ok] == []
    assert {finding.point for finding in findings} == POINTS


@pytest.mark.parametrize("owners", [[0, 1, 1, 2], [0, 0, 2], [1]], ids=["one_two_one", "two_none_one", "none_one_none"])
def test_units_are_the_sizes_written_by_hand(family: Family, vlm: VisionLanguageModel, owners: list[int]) -> None:
    batch = encoded(family, owners)
    units = vlm.units(batch)
    # In proportion: 3 tiles an image are one image.
    assert [a * sum(batch.units) for a in units["vision"]] == [b * sum(units["vision"]) for b in batch.units]
    assert units["language"] == [1, 1, 1]
