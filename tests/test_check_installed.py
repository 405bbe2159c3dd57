# SPDX-License-Identifier: Apache-2.0
"""scripts/check_installed.py: what `make setup` takes for installed."""

from __future__ import annotations

import runpy
import sys
import warnings
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    # The script imports pip, at which setuptools warns where torch has imported distutils before.
    warnings.filterwarnings("ignore", "Setuptools is replacing distutils", UserWarning)
    SCRIPT = runpy.run_path(str(Path(__file__).resolve().parent.parent / "scripts" / "check_installed.py"))


def problems(monkeypatch: pytest.MonkeyPatch, changed: dict[str, str | None], torch: list[str]) -> list[str]:
    """What it says of an installation of exactly the pins, but for some packages; None is one that is missing."""
    versions: dict[str, Any] = {**SCRIPT["pinned"](), "dmole": "0.1.0", "torch": "2.13.0+cpu", **changed}

    def version(name: str) -> str:
        found = versions[SCRIPT["canonicalize_name"](name)]
        if found is None:
            raise PackageNotFoundError(name)
        return str(found)

    names = SCRIPT["problems"].__globals__
    monkeypatch.setitem(names, "version", version)
    monkeypatch.setitem(names, "requires", lambda name: torch)
    lines: list[str] = names["problems"]()
    return lines


def test_the_pins_are_what_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems(monkeypatch, {}, ["filelock", "opt-einsum>=3.3; extra == 'opt-einsum'"]) == []


@pytest.mark.parametrize("name", ["torch", "peft", "numpy", "pytest", "rdkit", "dmole"])
def test_a_missing_package_is_noticed_in_every_extra(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (line,) = problems(monkeypatch, {name: None}, [])
    assert line.startswith(f"{name} is not installed")


@pytest.mark.skipif(sys.platform != "linux", reason="the extra triton is for Linux")
def test_triton_is_the_pin_s_unless_torch_pins_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pin = SCRIPT["pinned"]()["triton"]
    assert problems(monkeypatch, {"triton": None}, []) == [f"triton is not installed; expected {pin}"]
    assert problems(monkeypatch, {"triton": "3.7.1"}, []) == [f"triton is 3.7.1; expected {pin}"]
    assert problems(monkeypatch, {"triton": "3.7.1"}, ['triton==3.7.1; platform_system == "Linux"']) == []
    said = "triton is 3.6.0; expected ==3.7.1, which the installed torch pins"
    assert problems(monkeypatch, {"triton": "3.6.0"}, ["triton==3.7.1"]) == [said]


def test_another_version_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = problems(monkeypatch, {"peft": "0.15.0"}, [])
    assert line.startswith("peft is 0.15.0; expected ")
