# SPDX-License-Identifier: Apache-2.0
"""`dmole inspect MODEL`: what dmole sees in a model, and with `--check` whether it holds for these weights.

towers, candidates, the rule of the vision tower's rows, the budget, how many weights each method trains
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from dmole.config import RunConfig
from dmole.config_error import ConfigError
from dmole.methods import method_class, method_names
from dmole.methods.dmole.allocation import capacities, total_budget
from dmole.models.contract import Finding
from dmole.models.declaration import Declaration, read_declaration
from dmole.models.identity import weight_bytes
from dmole.models.towers import VISION
from dmole.models.vision_language import VisionLanguageModel

ROWS = {
    "images": "images: every image has as many rows",
    "tokens": "tokens: rows in proportion to the image tokens",
    "tiles": "tiles: as image_grid_pinpoints cuts the images",
    "padded": "padded: every sample has as many rows",
}


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What is printed. `methods` maps a name to the weights that a task trains, None where only data decide."""

    model: str
    facts: tuple[tuple[str, str], ...]
    towers: tuple[tuple[str, str, str, int, str, str], ...]  # tower, module, class, candidates, first, last
    methods: tuple[tuple[str, int | None], ...]
    parameters: int


def inspect(vlm: VisionLanguageModel, config: RunConfig | None = None, *, full: bool = False) -> Inspection:
    """Everything about a model that is `ready`; `config` gives ranks and budgets (the defaults where it is None)."""
    config = config or RunConfig()
    model = vlm.model
    settings = {name: config.method_settings(name) for name in method_names()}
    candidates = settings["dmole"].select_candidates(vlm.candidates)
    sizes = expert_sizes(vlm, candidates)
    dmole = config.method_settings("dmole").dmole
    room = capacities(candidates, dmole.unit)
    budget = total_budget(candidates, fraction=dmole.budget_fraction, unit=dmole.unit)
    identity = vlm.base_identity(full=full)
    parameters = sum(p.numel() for p in model.parameters())
    facts = [
        ("class", type(model).__name__),
        (
            "weights",
            f"{parameters:,} parameters, {str(model.dtype).removeprefix('torch.')}, {_size(weight_bytes(model))}",
        ),
        (
            "base",
            f"{identity['kind']} {identity['sha256'][:16]}" + (f", commit {c}" if (c := identity["commit"]) else ""),
        ),
    ]
    if VISION in vlm.candidates:
        facts.append(("vision rows", ROWS.get(vlm.declaration.rows, vlm.declaration.rows)))
    split = ", ".join(f"{tower} {number}" for tower, number in room.items())
    facts.append(("budget", f"{budget} {dmole.unit}s of {sum(room.values())} ({split})"))
    towers = []
    for tower, root in vlm.towers.items():
        names = candidates.get(tower, ("",))
        count = len(candidates.get(tower, ()))
        towers.append((tower, root, type(model.get_submodule(root)).__name__, count, names[0], names[-1]))
    return Inspection(
        model=vlm.source or type(model).__name__,
        facts=tuple(facts),
        towers=tuple(towers),
        methods=tuple((name, method_class(name).trained_weights(settings[name], sizes)) for name in method_names()),
        parameters=parameters,
    )


def expert_sizes(vlm: VisionLanguageModel, candidates: Mapping[str, Sequence[str]]) -> dict[str, dict[str, int]]:
    """By tower and linear, in + out: the weights of an expert of rank 1 there, for `Method.trained_weights`."""
    return {
        tower: {name: sum(_sides(vlm.model.get_submodule(name))) for name in names}
        for tower, names in candidates.items()
    }


def show(console: Console, found: Inspection) -> None:
    """The inspection as tables."""
    console.print(found.model, style="bold", highlight=False)
    for name, text in found.facts:
        console.print(f"  {name}: {text}", highlight=False, markup=False)
    towers = Table("tower", "module", "class", "candidates", "first and last candidate", title="Towers")
    for tower, root, kind, count, first, last in found.towers:
        towers.add_row(
            tower, root or "(the model)", kind, str(count), f"{first}\n{last}" if count else "none: no experts"
        )
    console.print(towers)
    methods = Table("method", "weights trained per task", "of the model", title="Methods")
    for name, weights in found.methods:
        if weights is None:
            methods.add_row(name, "not known before training", "")
        else:
            methods.add_row(name, f"{weights:,}", f"{100 * weights / found.parameters:.2f} %")
    console.print(methods)


def show_findings(console: Console, findings: Sequence[Finding]) -> bool:
    """The contract's findings as a table, with what to do about failures; whether all are ok."""
    table = Table("point", "what", "tower", "", "measured", title="Contract")
    for f in findings:
        table.add_row(str(f.point), f.name, f.tower, "ok" if f.ok else "FAILED", f.figure)
    console.print(table)
    failed = [finding for finding in findings if not finding.ok]
    for remedy in dict.fromkeys(f.remedy for f in failed):
        same = [f"{f.point} {f.name}{f', {f.tower} tower' if f.tower else ''}" for f in failed if f.remedy == remedy]
        console.print(f"{'; '.join(same)}:\n  {remedy}", markup=False, highlight=False)
    return not failed


def declaration_from(file: Path | None) -> Declaration:
    """The declaration of a YAML file: a mapping of its fields, or the section `declaration` of a configuration."""
    if file is None:
        return Declaration()
    try:
        read: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if isinstance(read, dict) and isinstance(read.get("declaration"), dict):
        read = read["declaration"]
    if not isinstance(read, dict):
        raise ConfigError(f"{file} holds a {type(read).__name__}; expected a mapping, such as rows: tiles.")
    return read_declaration(read)


def _sides(linear: Any) -> tuple[int, int]:
    return linear.in_features, linear.out_features


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
