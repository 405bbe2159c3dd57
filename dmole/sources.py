# SPDX-License-Identifier: Apache-2.0
"""What `stream:` and `model:` of a configuration name: a folder of the user's, or something this package makes."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from dmole.cache import cache_folder
from dmole.data.reading import read_stream
from dmole.data.sample import Stream
from dmole.models.multimodal import MultimodalModel, load_model

MINI = "mini"
TINY = "tiny"


def open_stream(name: str, console: Console) -> Stream:
    """`mini`: the benchmark of this package, built once into the cache; else a folder with stream.yaml."""
    if name != MINI:
        return read_stream(Path(name))
    from dmole.data.mini.build import build_mini

    folder = cache_folder() / "mini"
    if not folder.exists():
        console.print(f"building the mini benchmark in {folder} (once)", highlight=False)
    # Built here and checked by its manifest; decoding 15,000 images again would cost seconds for nothing.
    return read_stream(build_mini(folder), check_images=False)


def open_model(name: str, console: Console) -> MultimodalModel:
    """`mini`: the small model of this package; `tiny`: random weights for tests; else a folder with saved weights."""
    if name == TINY:
        from dmole.models.architecture import build_tiny_model

        return build_tiny_model()
    if name == MINI:
        from dmole.models.mini import load_mini_model

        return load_mini_model()
    return load_model(name)
