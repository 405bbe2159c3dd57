# SPDX-License-Identifier: Apache-2.0
"""The options of `dmole run` as a configuration, and which run folders it makes.

Imports happen inside the functions: torch takes seconds, and `dmole --help` should not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dmole.config import RunConfig


def recipe_config(recipe: str | None) -> RunConfig | None:
    """The configuration of a recipe; None for none."""
    from dmole.recipes import RECIPES

    if recipe is not None and recipe not in RECIPES:
        raise ValueError(f"--recipe is {recipe!r}; expected one of {', '.join(RECIPES)}. Name one of these.")
    return None if recipe is None else RECIPES[recipe]()


def run_config(
    *,
    stream: str | None,
    methods: list[str] | None,
    seeds: list[str] | None,
    orders: list[str] | None,
    model: str | None,
    recipe: str | None,
    config: Path | None,
    settings: Sequence[str],
    output: str | None,
) -> RunConfig:
    """The configuration that the options of `dmole run` ask for."""
    from dmole.config import load_config

    overrides = []
    for key, text in (("stream", stream), ("model", model), ("output", output)):
        if text is not None:
            overrides.append(f"{key}={json.dumps(text)}")
    if methods is not None:
        overrides.append(f"methods={json.dumps(split_names('--method', methods))}")
    if seeds is not None:
        overrides.append(f"seeds={json.dumps([_integer('--seed', item) for item in split_names('--seed', seeds)])}")
    if orders is not None:
        overrides.append(f"orders={json.dumps(orders)}")
    return load_config(config, base=recipe_config(recipe), overrides=[*overrides, *settings])


def split_names(option: str, values: Sequence[str]) -> list[str]:
    """The items of a repeatable option whose values are lists with commas. ValueError for an empty item."""
    items = [item.strip() for value in values for item in value.split(",")]
    if not all(items):
        raise ValueError(
            f"{option} is {','.join(values)!r}; expected names with commas between them. Remove the empty one."
        )
    return items


def _integer(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{option} is {text!r}; expected a whole number. Give for example {option} 0,1,2.") from None


def planned_runs(config: RunConfig) -> list[str]:
    """The names of the run folders that a configuration makes."""
    from dmole.runs.plan import order_label

    return [
        f"{method}-seed{seed}-{order_label(order)}"
        for order in config.orders
        for seed in config.seeds
        for method in config.methods
    ]


def earlier_runs(config: RunConfig) -> list[str]:
    """Those of them that exist already, finished or not."""
    folder = Path(config.output) / "runs"
    return [name for name in planned_runs(config) if (folder / name).exists()]
