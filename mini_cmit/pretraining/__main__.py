# SPDX-License-Identifier: Apache-2.0
"""``python -m mini_cmit.pretraining``: writes the corpus (about 8 GB) and trains the mini model on it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from dmole.cache import cache_folder


def main(
    output: Annotated[Path, typer.Option(help="Folder for the model; must not be a model already.")],
    corpus: Annotated[Path | None, typer.Option(help="Folder for the corpus; default: below the cache.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the corpus.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Weights and data order.")] = 0,
    start_from: Annotated[str, typer.Option(help="A saved model to go on with.")] = "",
    learning_rate: Annotated[float, typer.Option(help="Peak of the cosine.")] = 2e-3,
    vision_share: Annotated[float, typer.Option(help="Share of the seconds for the vision tower alone.")] = 0.15,
    told_share: Annotated[float, typer.Option(help="Share of the seconds for told scenes alone.")] = 0.15,
    bag_weight: Annotated[float, typer.Option(help="Weight of the bag of words beside the answers.")] = 0.3,
    processes: Annotated[int, typer.Option(help="Data-parallel processes of one thread each.")] = 2,
    max_seconds: Annotated[float, typer.Option(help="Ends the cosine earlier, by the clock.")] = math.inf,
) -> None:
    """Pretrains the base model of the mini benchmark from nothing."""
    # Here, not above: `--help` should not load torch, and the scenes need the packages of the extra `data`.
    from mini_cmit.pretraining.corpus import write_corpus
    from mini_cmit.pretraining.curriculum import CURRICULUM
    from mini_cmit.pretraining.train import PretrainingSettings, pretrain

    if (output / "model.safetensors").exists():
        raise typer.BadParameter(f"{output} already holds a model; expected a new folder. Name another, or remove it.")
    folder = corpus or cache_folder() / "pretraining"
    write_corpus(folder, CURRICULUM)
    settings = PretrainingSettings(
        epochs=epochs,
        seed=seed,
        learning_rate=learning_rate,
        vision_share=vision_share,
        told_share=told_share,
        bag_weight=bag_weight,
        max_seconds=max_seconds,
        start_from=start_from,
    )
    pretrain(folder, list(CURRICULUM), settings, output, processes=processes)


if __name__ == "__main__":
    typer.run(main)
