# SPDX-License-Identifier: Apache-2.0
"""What a number was measured with: machine, versions, commit, threads. No paths, no user names."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

import dmole
from dmole.arithmetic import arithmetic
from dmole.files import JSON
from dmole.machine import processor_name, usable_cores
from dmole.registry import GROUPS, registered
from dmole_kernels import choose_backend

PACKAGES = (
    "dmole", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "scipy", "pillow",
    "pycocoevalcap",
)  # fmt: skip


def describe_environment() -> dict[str, JSON]:
    """The environment of this process, JSON-able."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": processor_name(),
        "cores": usable_cores(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": "cpu",
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "arithmetic": arithmetic(),
        "kernels": choose_backend().name,
        "packages": package_versions(),
        "commit": _commit(),
    }


def package_versions() -> dict[str, str | None]:
    """The versions of the packages that results depend on, and of all that add names to dmole."""
    points = [point for group in GROUPS for point in registered(group).values()]
    adding = {point.dist.name: point.dist.version for point in points if point.dist is not None}
    return {**{name: _version(name) for name in PACKAGES}, **dict(sorted(adding.items()))}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source tree this package runs from, with "+" for local changes; None outside a tree."""
    root = Path(dmole.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head, changes = (
            subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changes else "")
