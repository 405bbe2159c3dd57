# SPDX-License-Identifier: Apache-2.0
"""What `stream: mini` stands for: the benchmark's folder, built once into the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dmole.cache import cache_folder


def mini_stream(say: Callable[[str], None]) -> Path:
    """The folder of the benchmark at its default size; ``say`` is told before it is built, which takes a minute."""
    from mini_cmit.tasks.build import build_mini

    folder = cache_folder() / "mini"
    if not folder.exists():
        say(f"building the mini benchmark in {folder} (once)")
    return build_mini(folder)
