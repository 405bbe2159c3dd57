# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels run in Triton's interpreter here: no GPU needed, and none used.

`tests/conftest.py` chooses it, which must come before Triton is imported; else what runs kernels is skipped, saying so,
where somebody has imported it before. Without Triton only the test that says so is collected.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dmole_kernels.triton_backend import available

if not available():
    collect_ignore_glob = ["test_triton_[!i]*.py", "test_triton_interpreter.py"]


@pytest.fixture
def triton_on_cpu() -> Iterator[None]:
    """`backend="triton"` on the device where the interpreter runs."""
    from dmole_kernels import testing

    with testing.triton_on_cpu():
        yield


@pytest.fixture(params=["reversed", "shuffled"])
def permuted_programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs a launch's programs in another order than theirs."""
    from triton.runtime.interpreter import interpreter_builder

    start = type(interpreter_builder).set_grid_idx

    def permuted(x: int, y: int, z: int) -> None:
        count = interpreter_builder.grid_dim[0]
        places = torch.arange(count - 1, -1, -1)
        if request.param == "shuffled":
            places = torch.randperm(count, generator=torch.Generator().manual_seed(count))
        start(interpreter_builder, int(places[x]), y, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", permuted)


def pytest_runtest_setup() -> None:
    if not available():
        return
    from dmole_kernels.triton_backend.launch import interpreting

    if not interpreting():
        pytest.skip(
            "triton was imported before without TRITON_INTERPRET=1; run pytest tests/kernels/triton_backend by itself"
        )
