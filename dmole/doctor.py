# SPDX-License-Identifier: Apache-2.0
"""`dmole doctor`: what this installation has, what it lacks, and the command that fixes each lack.

Uses only the standard library until it has found the packages it reports on: a broken installation is what it is for.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from dmole.machine import memory_gib, usable_cores

MINIMUM_PYTHON = (3, 10)
MINIMUM_MEMORY_GIB = 6.0
MINIMUM_DISK_GIB = 2.0
SHOWN_PACKAGES = ("torch", "transformers", "peft")

_REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9._-]+)\s*(?:\[[^\]]*\])?\s*\(?(?P<range>[^;)]*)\)?\s*(?:;(?P<marker>.*))?"
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report. `fix` is the command to type, empty where nothing is wrong."""

    what: str
    found: str
    ok: bool
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """A package that dmole's metadata names. `extra` is "" for what is always needed."""

    name: str
    versions: str
    extra: str


def examine() -> list[Finding]:
    """The whole report."""
    needed = requirements()
    findings = [_python()]
    if not needed:
        findings.append(
            Finding(
                what="dmole",
                found="not installed as a package",
                ok=False,
                fix='pip install --no-build-isolation -e ".[data,peft]"',
            )
        )
    findings += [package_finding(item) for item in needed if item.extra == "" or item.name in SHOWN_PACKAGES]
    findings += [_backend(), *_machine(), _cache(), *_of_packages()]
    return findings


def requirements(lines: Sequence[str] | None = None) -> list[Requirement]:
    """What dmole's metadata asks for; [] when dmole runs from a source tree that was never installed."""
    if lines is None:
        try:
            lines = importlib.metadata.requires("dmole") or []
        except importlib.metadata.PackageNotFoundError:
            return []
    found = []
    for line in lines:
        match = _REQUIREMENT.fullmatch(line.strip())
        if match is None:
            continue
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", match["marker"] or "")
        found.append(
            Requirement(name=match["name"], versions=match["range"].strip(), extra=extra.group(1) if extra else "")
        )
    return found


def package_finding(item: Requirement) -> Finding:
    """Whether a package is there, in a version that was tried."""
    wanted = f"{item.name}{item.versions}"
    fix = f'pip install "{wanted}"'
    try:
        version = importlib.metadata.version(item.name)
    except importlib.metadata.PackageNotFoundError:
        optional = item.extra != ""
        return Finding(what=item.name, found="not installed" + " (optional)" * optional, ok=optional, fix=fix)
    if not in_range(version, item.versions):
        return Finding(what=item.name, found=f"{version}, outside the tested {item.versions}", ok=False, fix=fix)
    return Finding(what=item.name, found=version, ok=True)


def in_range(version: str, versions: str) -> bool:
    """Whether a release lies in a range such as ">=2.6,<2.15": numbers only, "+cpu" and the like do not count."""
    have = _release(version)
    for part in filter(None, (piece.strip() for piece in versions.split(","))):
        match = re.fullmatch(r"(>=|<=|==|!=|<|>|~=)\s*([0-9][^\s]*)", part)
        if match is None:
            return False
        bound = _release(match[2])
        width = max(len(have), len(bound))
        left, right = (have + (0,) * width)[:width], (bound + (0,) * width)[:width]
        same_series = have[: len(bound) - 1] == bound[:-1]
        holds = {
            ">=": left >= right,
            "<=": left <= right,
            "==": left == right,
            "!=": left != right,
            "<": left < right,
            ">": left > right,
            "~=": left >= right and same_series,
        }
        if not holds[match[1]]:
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def _python() -> Finding:
    wanted = ".".join(map(str, MINIMUM_PYTHON))
    return Finding(
        what="python",
        found=platform.python_version(),
        ok=sys.version_info[:2] >= MINIMUM_PYTHON,
        fix=f"install Python {wanted} or newer and make a new environment with it",
    )


def _backend() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding(what="backend", found="none without torch", ok=False, fix="pip install torch")
    from dmole_kernels import choose_backend

    choice = choose_backend("auto")
    return Finding(what="backend", found=f"{choice.name} ({choice.reason})", ok=True)


def _machine() -> list[Finding]:
    threads = f"{usable_cores()} cores"
    if importlib.util.find_spec("torch") is not None:
        import torch

        threads += f", torch uses {torch.get_num_threads()} threads"
    findings = [Finding(what="threads", found=threads, ok=True)]
    memory = memory_gib()
    if memory is not None:
        findings.append(
            Finding(
                what="memory",
                found=f"{memory:.1f} GiB",
                ok=memory >= MINIMUM_MEMORY_GIB,
                fix=(
                    "use a machine with more memory, or lower training.per_device_train_batch_size and "
                    "evaluation.per_device_eval_batch_size"
                ),
            )
        )
    return findings


def _cache() -> Finding:
    from_environment = os.environ.get("DMOLE_CACHE") or os.environ.get("XDG_CACHE_HOME")
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("numpy") is None:
        return Finding(what="cache folder", found=from_environment or "default", ok=True)
    from dmole.cache import cache_folder

    folder = cache_folder()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free / 2**30
    state = "" if folder.exists() else ", not made yet"
    return Finding(
        what="cache folder",
        found=f"{folder} ({free:.1f} GiB free{state})",
        ok=free >= MINIMUM_DISK_GIB and os.access(existing, os.W_OK),
        fix="export DMOLE_CACHE=/a/writable/folder",
    )


def _of_packages() -> list[Finding]:
    """What installed packages add to the report: functions without arguments under the entry points `dmole.doctor`."""
    findings: list[Finding] = []
    for point in sorted(importlib.metadata.entry_points(group="dmole.doctor"), key=lambda point: point.name):
        try:
            findings += point.load()()
        except Exception as error:  # said as a finding: a library that fails to import raises whatever it likes
            findings.append(
                Finding(
                    what=point.name,
                    found=f"fails with {type(error).__name__}: {error}",
                    ok=False,
                    fix="install what is missing above, then run dmole doctor again",
                )
            )
    return findings
