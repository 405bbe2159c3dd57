# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels run in Triton's interpreter here: no GPU needed, and none used.

`tests/conftest.py` chooses it, which must come before Triton is imported; else what runs kernels is skipped, saying so,
where somebody has imported it before. Without Triton only the test that says so is collected.
"""

from __future__ import annotations

import pytest

from dmole_kernels.triton_backend import available

if not available():
    collect_ignore_glob = ["test_triton_[!i]*.py", "test_triton_interpreter.py"]


def pytest_runtest_setup() -> None:
    if not available():
        return
    from dmole_kernels.triton_backend.launch import interpreting

    if not interpreting():
        pytest.skip(
            "triton was imported before without TRITON_INTERPRET=1; run pytest tests/kernels/triton_backend by itself"
        )
