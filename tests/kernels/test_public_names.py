# SPDX-License-Identifier: Apache-2.0
"""The public surface of dmole_kernels: what is exported is documented, and no module is hidden by a function."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

import dmole_kernels

ROOT = Path(__file__).resolve().parents[2]
MODULES = [info.name for info in pkgutil.iter_modules(dmole_kernels.__path__)]
PUBLIC_MODULES = {"reference", "testing", "cpu", "cuda", "triton_backend", "peft"}


def test_docs_name_every_public_name_once_and_nothing_else() -> None:
    documented = re.findall(r"^::: dmole_kernels\.([\w.]+)$", (ROOT / "docs/kernels.md").read_text(), re.MULTILINE)
    assert sorted(set(documented) - PUBLIC_MODULES) == sorted(dmole_kernels.__all__)
    assert len(documented) == len(set(documented))


def test_every_public_name_exists_and_explains_itself() -> None:
    for name in dmole_kernels.__all__:
        value = getattr(dmole_kernels, name)
        assert isinstance(value, str | dict) or (value.__doc__ or "").strip(), name


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_private_or_has_the_name_of_no_function(name: str) -> None:
    assert name.startswith("_") or name in PUBLIC_MODULES
    if name != "__main__" and not name.startswith("_C"):
        try:
            module = importlib.import_module(f"dmole_kernels.{name}")
        except ImportError as error:
            # The bridge to PEFT needs PEFT.
            assert name == "peft" and "peft" in str(error)
            return
        assert isinstance(module, ModuleType)
        assert getattr(dmole_kernels, name) is module


def test_importing_an_op_by_the_path_of_a_module_is_an_error() -> None:
    for op in ("multi_lora", "frozen_linear", "router_score"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"dmole_kernels.{op}")
