# SPDX-License-Identifier: Apache-2.0
"""What `dmole doctor` says about the mini benchmark: the packages that carry its material, and the shipped model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dmole.doctor import Finding, Requirement, package_finding, requirements
from mini_cmit.model.shipped import MINI_WEIGHTS

MODEL_FILES = ("config.json", "model.safetensors", "processor_config.json", "tokenizer.json")


def findings() -> list[Finding]:
    """The lines of the report."""
    return [benchmark(requirements()), base_model(MINI_WEIGHTS)]


def benchmark(needed: Sequence[Requirement]) -> Finding:
    """The packages that carry the benchmark's material, of what dmole's metadata asks for."""
    data = [item for item in needed if item.extra == "data"]
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
