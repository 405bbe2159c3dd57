# SPDX-License-Identifier: Apache-2.0
"""The contract on a tiny random model of each family: towers, candidates and units come from the rules alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dmole.models.contract import Probes, check
from dmole.models.prompts import Encoded
from dmole.models.vision_language import VisionLanguageModel, wrap
from tests.kernels.families.tiny import FAMILIES, Family

SAMPLES = 3
# Every point that needs no processor.
POINTS = {1, 2, 3, 4, 5, 6, 7, 9}


def encoded(family: Family, owners: Sequence[int]) -> Encoded:
    batch = family.batch(owners, SAMPLES)
    ids, mask = batch.arguments["input_ids"], batch.arguments["attention_mask"]
    labels = ids.clone()
    for row, length in zip(labels, mask.sum(1).tolist(), strict=True):
        row[: length - 3] = -100
        row[length:] = -100
    images = tuple(owners.count(s) for s in range(SAMPLES))
    lengths = tuple(length - 3 for length in mask.sum(1).tolist())
    return Encoded(inputs=batch.arguments, labels=labels, images=images, prompt_lengths=lengths)


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
    units = vlm.units(encoded(family, owners))
    truth = family.batch(owners, SAMPLES).units
    # In proportion: 3 tiles an image are one image.
    assert [a * sum(truth) for a in units["vision"]] == [b * sum(units["vision"]) for b in truth]
    assert units["language"] == [1, 1, 1]
