# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels run in Triton's interpreter here: no GPU needed, and none used.

`tests/conftest.py` selects it before Triton is imported; where Triton was imported earlier, tests that run kernels are
skipped with the reason. Without Triton only the test of the missing installation is collected.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from dmole_kernels import triton_backend
from dmole_kernels.triton_backend import available

NAME = "dmole_kernels.triton_backend"
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


@pytest.fixture
def numpy_stays_silent() -> Iterator[None]:
    """The interpreter computes with NumPy, which warns of every NaN that a product makes."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def package() -> Callable[[str], ModuleType]:
    """The modules of triton_backend by name, as they are."""
    return lambda module: import_module(f"{NAME}.{module}")


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Callable[[str], ModuleType]]]:
    """`plant(name, file, text, instead)`: triton_backend under another name, with one text of one file replaced."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def planted(name: str, file: str, text: str, instead: str) -> Callable[[str], ModuleType]:
        copy = f"mutant_{name}"
        shutil.copytree(Path(triton_backend.__file__).parent, tmp_path / copy)
        for source in (tmp_path / copy).glob("*.py"):
            content = source.read_text(encoding="utf-8").replace(NAME, copy)
            if source.name == file:
                assert content.count(text) == 1, f"{file} has {content.count(text)} times: {text}"
                content = content.replace(text, instead)
            source.write_text(content, encoding="utf-8")
        return lambda module: import_module(f"{copy}.{module}")

    yield planted
    for module in [module for module in sys.modules if module.startswith("mutant_")]:
        del sys.modules[module]


def pytest_runtest_setup() -> None:
    if not available():
        return
    from dmole_kernels.triton_backend.launch import interpreting

    if not interpreting():
        pytest.skip(
            "triton was imported before without TRITON_INTERPRET=1; run pytest tests/kernels/triton_backend by itself"
        )
