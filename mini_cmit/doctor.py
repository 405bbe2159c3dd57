# SPDX-License-Identifier: Apache-2.0
"""What `dmole doctor` says about the mini benchmark: its packages, the shipped model, the folder it is built in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement

from dmole.cache import cache_folder
from dmole.doctor import Finding, is_optional, package_finding, requirements
from mini_cmit.model.shipped import MINI_WEIGHTS

MINIMUM_DISK_GIB = 2.0
MODEL_FILES = ("config.json", "model.safetensors", "processor_config.json", "tokenizer.json")


def findings() -> list[Finding]:
    """The lines of the report."""
    return [benchmark(requirements()), base_model(MINI_WEIGHTS), cache(cache_folder())]


def benchmark(needed: Sequence[Requirement]) -> Finding:
    """The packages that carry the benchmark's material, of what dmole's metadata asks for."""
    data = [item for item in needed if is_optional(item) and not is_optional(item, "data")]
    lacking = [finding.what for finding in map(package_finding, data) if finding.found.startswith("not installed")]
    if not data:
        found, ok = "unknown, dmole is not installed as a package", False
    elif lacking:
        found, ok = f"lacks {', '.join(lacking)}", False
    else:
        found, ok = f"all {len(data)} packages", True
    return Finding(what="mini benchmark", found=found, ok=ok, fix='pip install --no-build-isolation -e ".[data]"')


def base_model(folder: Path) -> Finding:
    """The weights of the model called `mini`."""
    lacking = [name for name in MODEL_FILES if not (folder / name).is_file()]
    if lacking:
        found = f"lacks {', '.join(lacking)}"
    else:
        size = (folder / "model.safetensors").stat().st_size / 2**20
        found = f"{size:.1f} MiB"
    return Finding(
        what="mini base model", found=found, ok=not lacking, fix=f"python -m mini_cmit.pretraining --output {folder}"
    )


def cache(folder: Path) -> Finding:
    """Where the benchmark's images and the features of images are kept."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free / 2**30
    state = "" if folder.exists() else ", not made yet"
    return Finding(
        what="cache folder",
        found=f"{folder} ({free:.1f} GiB free{state})",
        ok=free >= MINIMUM_DISK_GIB and os.access(existing, os.W_OK),
        fix="export DMOLE_CACHE=/a/writable/folder",
    )
