# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator

import pytest

from dmole_kernels import cpu


@pytest.fixture(params=("scalar", "avx2", "avx512", "avx512_bf16", "brgemm"))
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """The compiled kernels at one instruction set; skipped where this machine does not run it."""
    if request.param not in cpu.available_isas():
        pytest.skip(f"this machine runs {cpu.available_isas()}")
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)
