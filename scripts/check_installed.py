# SPDX-License-Identifier: Apache-2.0
"""Exits 0 when dmole, its extras and torch are installed in the versions of constraints.txt; else says what is missing.

`make setup` asks this first, so that a machine without a network and with everything installed downloads nothing.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("data", "dev", "peft", "triton")


def wanted() -> list[str]:
    """Names of the packages that pyproject.toml asks for, in the extras that make installs."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    tables = re.findall(r"^(dependencies|\w+) = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    chosen = "".join(body for name, body in tables if name == "dependencies" or name in EXTRAS)
    return re.findall(r'^\s*"([A-Za-z0-9._-]+)', chosen, re.MULTILINE)


def pinned() -> dict[str, str]:
    """{normalised name: version} of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line)
    return {re.sub(r"[-_.]+", "-", name).lower(): value for name, value in pairs}


def problems() -> list[str]:
    """One line for every package that is missing or has another version."""
    pins, found = pinned(), []
    for name in [*wanted(), "dmole"]:
        expected = pins.get(re.sub(r"[-_.]+", "-", name).lower())
        try:
            got = version(name).split("+")[0]
        except PackageNotFoundError:
            found.append(f"{name} is not installed" + (f"; expected {expected}" if expected else ""))
            continue
        if expected is not None and got != expected:
            found.append(f"{name} is {got}; expected {expected}")
    return found


if __name__ == "__main__":
    lines = problems()
    print("\n".join(lines), end="\n" if lines else "")
    sys.exit(1 if lines else 0)
