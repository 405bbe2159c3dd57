# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from dmole_kernels import cpu

# DMOLE_DRAWS=2000 is the long run (make test-long). The same draws at every run: a failure is one for everybody.
settings.register_profile(
    "kernels",
    max_examples=int(os.environ.get("DMOLE_DRAWS", "40")),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("kernels")


@pytest.fixture(params=("scalar", "avx2", "avx512", "avx512_bf16", "brgemm"))
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """The compiled kernels at one instruction set; skipped where this machine does not run it."""
    if request.param not in cpu.available_isas():
        pytest.skip(f"this machine runs {cpu.available_isas()}")
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)
