# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from dmole_kernels import BACKENDS
from dmole_kernels.triton_backend import MISSING, available


def test_the_backend_is_there_for_gpus_where_triton_is() -> None:
    if not available():
        pytest.skip(MISSING)
    assert BACKENDS["triton"] == ("cuda",)
