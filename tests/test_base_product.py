# SPDX-License-Identifier: Apache-2.0
"""The committed record of what the base product does, and the promise beside it, measured anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.base_product import DTYPES, WIDTHS, calls_that_differ, compare
from benchmarks.machine import dtype_name
from dmole_kernels import cpu

RECORD = Path(__file__).parent.parent / "benchmarks" / "results" / "base_product.json"


@pytest.mark.skipif(cpu.EXTENSION is None, reason=f"no compiled extension: {cpu.MISSING}")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_the_delta_s_rows_depend_on_neither_their_number_nor_the_threads(dtype: torch.dtype) -> None:
    for widths in WIDTHS[:2]:
        assert compare(dtype, *widths, (1, 2))["delta differs"] == []


def test_a_product_that_does_depend_on_them_is_seen() -> None:
    x = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    assert calls_that_differ(lambda n: x[:n] + (n < 3), (1,)) == ["1 x 1", "2 x 1"]


def test_the_record_is_whole_and_keeps_the_promise() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    cases = [(case["dtype"], case["in_features"], case["out_features"]) for case in record["cases"]]
    assert cases == [(dtype_name(dtype), *widths) for dtype in DTYPES for widths in WIDTHS]
    assert all(case["delta differs"] == [] for case in record["cases"])
    assert record["machine"] and record["versions"] and record["commit"]
