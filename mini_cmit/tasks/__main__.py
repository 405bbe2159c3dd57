# SPDX-License-Identifier: Apache-2.0
"""``python -m mini_cmit.tasks``: builds the mini benchmark from the installed packages, or finds it already built."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dmole.cache import cache_folder

WRONG_INPUT = 2


def main(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to build; default: the cache.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the renderings.")] = 0,
    image_side: Annotated[int, typer.Option(help="Pixels per side.")] = 160,
    train: Annotated[int, typer.Option(help="Training samples per task.")] = 1500,
    validation: Annotated[int, typer.Option(help="Validation samples per task.")] = 100,
    test: Annotated[int, typer.Option(help="Test samples per task.")] = 150,
    sheets: Annotated[Path | None, typer.Option(help="Also write one contact sheet per task here.")] = None,
) -> None:
    """Build the mini benchmark from the installed packages, or find it already built."""
    # Here, not above: `--help` should not load what the tasks draw with.
    from mini_cmit.tasks.build import build_mini

    try:
        folder = build_mini(
            output or cache_folder() / "mini",
            seed=seed,
            image_side=image_side,
            train=train,
            validation=validation,
            test=test,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(WRONG_INPUT) from error
    print(folder)
    if sheets is not None:
        from mini_cmit.tasks.contact_sheet import write_contact_sheets

        for path in write_contact_sheets(folder, sheets):
            print(path)


if __name__ == "__main__":
    typer.run(main)
