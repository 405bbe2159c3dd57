# SPDX-License-Identifier: Apache-2.0
"""The contract on folders that save_pretrained wrote, through their own processors, with images that are drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dmole.models.contract import check, drawn_probes
from dmole.models.declaration import Declaration
from dmole.models.loading import load

FolderOf = Callable[[str], Path]
RULES = {"llava": "images", "llava_next": "tiles", "idefics3": "tokens", "gemma3": "images", "paddleocr_vl": "tokens"}
POINTS = {1, 2, 3, 4, 5, 6, 7, 9, 10}


@pytest.mark.parametrize("family", RULES)
def test_every_point_holds_and_the_rule_of_the_rows_is_found(family: str, folder_of: FolderOf) -> None:
    vlm = load(folder_of(family)).ready()
    assert vlm.declaration.rows == RULES[family]
    findings = check(vlm, drawn_probes(vlm))
    assert [finding for finding in findings if not finding.ok] == []
    assert {finding.point for finding in findings} == POINTS


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"quantization": "int8"}, {"device_map": "auto"}], ids=str)
def test_every_point_holds_in_other_dtypes_quantised_and_placed(settings: dict[str, str], folder_of: FolderOf) -> None:
    vlm = load(folder_of("idefics3"), **settings).ready()  # type: ignore[arg-type]
    findings = check(vlm, drawn_probes(vlm))
    assert [finding for finding in findings if not finding.ok] == []
    assert {finding.point for finding in findings} == POINTS


# Each of these rules is right for another family: gates reach rows of other samples, or the rows are not whole.
WRONG = [("idefics3", "images"), ("llava_next", "tokens"), ("llava_next", "images"), ("paddleocr_vl", "images"),
         ("paddleocr_vl", "padded"), ("llava", "padded")]  # fmt: skip


@pytest.mark.parametrize(("family", "rows"), WRONG, ids="_".join)
def test_wrong_rows_fail_the_swap_test(family: str, rows: str, folder_of: FolderOf) -> None:
    vlm = load(folder_of(family), declaration=Declaration(rows=rows))  # type: ignore[arg-type]
    failed = {finding.point for finding in check(vlm, drawn_probes(vlm), save=False) if not finding.ok}
    assert 4 in failed
    assert failed <= {4, 5, 10}


def test_rows_of_tiles_that_nobody_declared_are_refused(folder_of: FolderOf) -> None:
    """LLaVA-NeXT without its line in KNOWN: tiles are in proportion neither to images nor to tokens."""
    import dataclasses

    vlm = load(folder_of("llava_next"))
    bare = dataclasses.replace(vlm, declaration=dataclasses.replace(vlm.declaration, rows="auto"))
    with pytest.raises(ValueError, match=r"rows: images of different shapes have .* Set declaration.rows to tiles"):
        bare.ready()
