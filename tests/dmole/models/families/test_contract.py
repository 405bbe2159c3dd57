# SPDX-License-Identifier: Apache-2.0
"""The contract on a tiny random model of each family: towers, candidates and units come from the rules alone."""

from __future__ import annotations

import pytest

from dmole.models.contract import check
from dmole.models.vision_language import VisionLanguageModel, wrap
from tests.dmole.models.families.batches import POINTS, SAMPLES, encoded, probes
from tests.dmole.models.families.wide import WIDE
from tests.kernels.families.tiny import FAMILIES, Family


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


@pytest.mark.long
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", WIDE)
def test_every_point_holds_in_more_families(name: str) -> None:
    family = WIDE[name]
    vlm = wrap(family.build())
    findings = check(vlm, probes(family))
    assert [finding for finding in findings if not finding.ok] == []
    assert {finding.point for finding in findings} == POINTS
    if "vision" in vlm.candidates:
        units, truth = vlm.units(encoded(family, [0, 0, 2]))["vision"], family.batch([0, 0, 2], SAMPLES).units
        assert [a * sum(truth) for a in units] == [b * sum(units) for b in truth]
