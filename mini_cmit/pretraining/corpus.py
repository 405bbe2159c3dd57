# SPDX-License-Identifier: Apache-2.0
"""The pretraining corpus on disk: one shard per family of scenes, features [N, C, H, W] float16 and turns as JSONL.

    scene i of family f  =  f(random.Random("f/i"))         nothing else decides it, so a shard can be made in pieces

    <family>.npy         features
    <family>.jsonl       turns
    <family>.json        manifest: what the two were made from, and their sha256; written last

The frozen stem sees every image once; training then reads its features for as many epochs as it likes. The stem
computes images one by one, so the number of workers changes no bit.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from dmole.arithmetic import arithmetic
from dmole.files import file_digest, write_atomically
from mini_cmit.model.stem import STEM_CHANNELS, STEM_STRIDE, EfficientNetLite0, stem_digest
from mini_cmit.pretraining.scene import SIDE, Scene, Turn
from mini_cmit.tasks.build import material_origin

GRID = SIDE // STEM_STRIDE
_CHUNK = 64

SceneFamily = Callable[[random.Random], Scene]


@dataclass(frozen=True)
class Shard:
    """Raw (not standardised) stem features, and the turns of every image."""

    family: str
    features: np.ndarray
    turns: tuple[tuple[Turn, ...], ...]


def _part(arguments: tuple[str, SceneFamily, int, int, Path]) -> list[list[dict[str, str]]]:
    """Renders scenes start..stop and writes their features into the shard's array."""
    family, make, start, stop, file = arguments
    torch.set_num_threads(1)
    stem = EfficientNetLite0()
    features = np.load(file, mmap_mode="r+")
    turns = []
    for first in range(start, stop, _CHUNK):
        scenes = [make(random.Random(f"{family}/{index}")) for index in range(first, min(first + _CHUNK, stop))]
        pixels = np.stack([np.asarray(scene.image.convert("RGB")) for scene in scenes])
        maps = stem(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())
        features[first : first + len(scenes)] = maps.half().numpy()
        turns += [[asdict(turn) for turn in scene.turns] for scene in scenes]
    features.flush()
    return turns


def write_shard(folder: Path, family: str, make: SceneFamily, count: int, *, workers: int = 2) -> None:
    """Writes a family's three files; a shard that was made from the same and whose files are whole is kept.

    Reading all of the corpus for its digests takes some ten seconds, before hours of training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, listing, manifest = (folder / f"{family}.{ending}" for ending in ("npy", "jsonl", "json"))
    made_from = {"scene": f"{make.__module__}.{make.__qualname__}", "count": count, **_origin()}
    if _is_whole(manifest, made_from, (file, listing)):
        return
    # A run that is killed below leaves files without a manifest, which are made again.
    manifest.unlink(missing_ok=True)
    np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=(count, STEM_CHANNELS, GRID, GRID)).flush()
    edges = [round(count * part / (4 * workers)) for part in range(4 * workers + 1)]
    parts = [(family, make, start, stop, file) for start, stop in zip(edges, edges[1:], strict=False)]
    with ProcessPoolExecutor(workers) as pool:
        turns = [item for part in pool.map(_part, parts) for item in part]
    write_atomically(listing, "".join(json.dumps(item) + "\n" for item in turns).encode())
    digests = {path.name: file_digest(path) for path in (file, listing)}
    write_atomically(manifest, (json.dumps({"made_from": made_from, "sha256": digests}, indent=1) + "\n").encode())


def _origin() -> dict[str, object]:
    """What features and turns follow from besides the scene and its number."""
    source = hashlib.sha256()
    for module in sorted(Path(__file__).parent.glob("*.py")):
        source.update(module.name.encode() + b"\0" + module.read_bytes())
    return {
        "pretraining_sha256": source.hexdigest(),
        "material": material_origin(),
        "stem": stem_digest(),
        "arithmetic": arithmetic(),
    }


def _is_whole(manifest: Path, made_from: dict[str, object], files: Sequence[Path]) -> bool:
    try:
        found = json.loads(manifest.read_bytes())
        if found["made_from"] != made_from:
            return False
        return all(found["sha256"][file.name] == file_digest(file) for file in files)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def write_corpus(folder: Path, families: Mapping[str, tuple[SceneFamily, int]], *, workers: int = 2) -> None:
    """Every family's shard; (scene function, number of images) by name."""
    for family, (make, count) in families.items():
        write_shard(folder, family, make, count, workers=workers)


def read_shard(folder: Path, family: str) -> Shard:
    """The features stay on disk (memory-mapped); the turns are read."""
    with (folder / f"{family}.jsonl").open() as lines:
        turns = tuple(tuple(Turn(**turn) for turn in json.loads(line)) for line in lines)
    return Shard(family, np.load(folder / f"{family}.npy", mmap_mode="r"), turns)
