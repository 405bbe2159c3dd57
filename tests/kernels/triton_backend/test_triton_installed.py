# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from dmole_kernels import BACKENDS
from dmole_kernels.triton_backend import available


def test_the_backend_is_there_for_gpus_where_triton_is() -> None:
    if not available():
        pytest.skip("triton is not installed, so its kernels are not tested: pip install triton==3.9.0")
    assert BACKENDS["triton"] == ("cuda",)
