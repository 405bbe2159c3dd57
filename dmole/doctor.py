# SPDX-License-Identifier: Apache-2.0
"""`dmole doctor`: what this installation has, what it lacks, and the command that fixes each lack.

Uses only the standard library until it has found the packages it reports on: a broken installation is what it is for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dmole.machine import memory_gib, usable_cores

if TYPE_CHECKING:
    from packaging.requirements import Requirement

from dmole import registry

MINIMUM_PYTHON = (3, 10)
MINIMUM_MEMORY_GIB = 6.0
SHOWN_PACKAGES = ("torch", "transformers", "peft")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report. `fix` is the command to type, empty where nothing is wrong."""

    what: str
    found: str
    ok: bool
    fix: str = ""


def examine() -> list[Finding]:
    """The whole report."""
    findings = [_python()]
    if importlib.util.find_spec("packaging") is None:
        findings.append(Finding(what="packaging", found="not installed", ok=False, fix="pip install packaging"))
    else:
        needed = requirements()
        if not needed:
            findings.append(
                Finding(
                    what="dmole",
                    found="not installed as a package",
                    ok=False,
                    fix='pip install --no-build-isolation -e ".[data,peft]"',
                )
            )
        findings += [package_finding(item) for item in needed if not is_optional(item) or item.name in SHOWN_PACKAGES]
    return [*findings, torchvision_finding(), _backend(), *_machine(), *_of_packages()]


def requirements(lines: Sequence[str] | None = None) -> list[Requirement]:
    """What dmole's metadata asks for; [] when dmole runs from a source tree that was never installed."""
    from packaging.requirements import Requirement

    if lines is None:
        try:
            lines = importlib.metadata.requires("dmole") or []
        except importlib.metadata.PackageNotFoundError:
            return []
    return [Requirement(line) for line in lines]


def is_optional(item: Requirement, extra: str = "") -> bool:
    """Whether an installation without extras, or with this one alone, does without the package."""
    return item.marker is not None and not item.marker.evaluate({"extra": extra})


def package_finding(item: Requirement) -> Finding:
    """Whether a package is there, in a version that was tried."""
    fix = f'pip install "{item.name}{item.specifier}"'
    try:
        version = importlib.metadata.version(item.name)
    except importlib.metadata.PackageNotFoundError:
        optional = is_optional(item)
        return Finding(what=item.name, found="not installed" + " (optional)" * optional, ok=optional, fix=fix)
    if not item.specifier.contains(version, prereleases=True):
        return Finding(what=item.name, found=f"{version}, outside the tested {item.specifier}", ok=False, fix=fix)
    return Finding(what=item.name, found=version, ok=True)


def _python() -> Finding:
    wanted = ".".join(map(str, MINIMUM_PYTHON))
    return Finding(
        what="python",
        found=platform.python_version(),
        ok=sys.version_info[:2] >= MINIMUM_PYTHON,
        fix=f"install Python {wanted} or newer and make a new environment with it",
    )


def torchvision_finding() -> Finding:
    """Whether torchvision, where it is installed, imports: if not, no image processor of transformers does either."""
    if importlib.util.find_spec("torchvision") is None:
        found = "not installed (optional: processors that take videos too, such as Qwen-VL's and InternVL's, need it)"
        return Finding(what="torchvision", found=found, ok=True, fix=_torchvision_fix())
    try:
        version = importlib.import_module("torchvision").__version__
    except Exception as error:  # beside another build of torch: RuntimeError, OSError or ImportError
        found = f"fails to import ({type(error).__name__}: {' '.join(str(error).split())})"
        fix = f"{_torchvision_fix()}; or pip uninstall torchvision, which few models need"
        return Finding(what="torchvision", found=found, ok=False, fix=fix)
    return Finding(what="torchvision", found=version, ok=True)


def _torchvision_fix() -> str:
    try:
        major, minor = importlib.metadata.version("torch").split("+")[0].split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return "pip install torch torchvision"
    # torch 2.6 and torchvision 0.21 belong together, 2.13 and 0.28, and so on.
    release = f"==0.{int(minor) + 15}.*" if major == "2" else ""
    return f'pip install "torchvision{release}" from the index that torch {major}.{minor} was installed from'


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


def _of_packages() -> list[Finding]:
    """What installed packages add to the report, and which of the names that they register cannot be used."""
    findings: list[Finding] = []
    for group in registry.GROUPS:
        try:
            points = registry.registered(group)
        except ValueError as error:
            findings.append(Finding(what=group, found=str(error), ok=False, fix="pip uninstall one of the two"))
            continue
        for point in points.values():
            try:
                value = _usable(point)
                findings += value() if group == "dmole.doctor" else []
            except Exception as error:  # reported as a finding: a library that fails to import raises whatever it likes
                fix = "install what is missing above, then run dmole doctor again"
                found = f"fails with {type(error).__name__}: {error}"
                findings.append(Finding(what=point.name, found=found, ok=False, fix=fix))
    return findings


def _usable(point: importlib.metadata.EntryPoint) -> Any:
    """What an entry point names, checked as its user checks it."""
    if point.group == "dmole.methods":
        from dmole.methods import method_class

        return method_class(point.name)
    if point.group == "dmole.metrics":
        from dmole.metrics import METRICS

        return METRICS[point.name]
    return registry.called(point, registry.load(point))
