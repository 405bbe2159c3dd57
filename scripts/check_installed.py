# SPDX-License-Identifier: Apache-2.0
"""Exits 0 when dmole, its extras and torch are installed in the versions of constraints.txt; else says what is missing.

`make setup` asks this first, so that a machine without a network and with everything installed downloads nothing.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

# pip is in every environment that `make` makes, before anything else is.
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("data", "dev", "metrics", "peft", "triton")


def wanted() -> list[Requirement]:
    """What pyproject.toml asks for on this machine, in the extras that make installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + [line for name in EXTRAS for line in project["optional-dependencies"][name]]
    return here(lines)


def here(lines: list[str]) -> list[Requirement]:
    """The requirements whose marker holds on this machine, without any extra."""
    found = map(Requirement, lines)
    return [item for item in found if item.marker is None or item.marker.evaluate({"extra": ""})]


def pinned() -> dict[str, str]:
    """{normalised name: version} of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line)
    return {canonicalize_name(name): value for name, value in pairs}


def pinned_by_torch() -> dict[str, Requirement]:
    """{name: requirement} of the installed torch. A CUDA build pins the Triton it needs, and no pin overrules that."""
    try:
        return {canonicalize_name(item.name): item for item in here(requires("torch") or [])}
    except PackageNotFoundError:
        return {}


def problems() -> list[str]:
    """One line for every package that is missing or has another version."""
    pins, of_torch, found = pinned(), pinned_by_torch(), []
    for requirement in [*wanted(), Requirement("dmole")]:
        name = requirement.name
        expected = pins.get(canonicalize_name(name))
        try:
            got = version(name).split("+")[0]
        except PackageNotFoundError:
            found.append(f"{name} is not installed" + (f"; expected {expected}" if expected else ""))
            continue
        torch_s = of_torch.get(canonicalize_name(name))
        if name == "triton" and torch_s is not None:
            if got not in torch_s.specifier:
                found.append(f"triton is {got}; expected {torch_s.specifier}, which the installed torch pins")
        elif expected is not None and got != expected:
            found.append(f"{name} is {got}; expected {expected}")
    return found


if __name__ == "__main__":
    lines = problems()
    print("\n".join(lines), end="\n" if lines else "")
    sys.exit(1 if lines else 0)
