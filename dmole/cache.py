# SPDX-License-Identifier: Apache-2.0
"""Where things that can be made again are kept: the mini benchmark's images and the image features of the stem.

The folder is ``$DMOLE_CACHE`` if set, else ``$XDG_CACHE_HOME/dmole``, else ``~/.cache/dmole``. Deleting it
costs time only.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def cache_folder() -> Path:
    """The cache's root; not created here."""
    if explicit := os.environ.get("DMOLE_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmole"


class ImageFeatureCache:
    """One float16 array per image content: ``features(paths)`` computes what is missing and reads the rest.

    The key is the SHA-256 of the image file's bytes and of ``version`` (which names the processor and its settings), so
    an image that changes, or another processor, never meets an old entry. Files appear by rename: processes may
    share the folder.
    """

    def __init__(self, folder: Path, version: str, compute: Callable[[Sequence[Path]], Tensor], batch_size: int = 32):
        self._folder = folder
        self._version = version.encode()
        self._compute = compute
        self._batch_size = batch_size
        self._keys: dict[Path, str] = {}

    def features(self, images: Sequence[Path]) -> Tensor:
        """[B, C, H, W] float32 for the images, in their order."""
        self.warm(images)
        return torch.from_numpy(np.stack([np.load(self._file(image)) for image in images])).float()

    def warm(self, images: Sequence[Path], on_progress: Callable[[int], None] | None = None) -> int:
        """Computes and stores what is missing; returns how many that were."""
        missing = [image for image in dict.fromkeys(images) if not self._file(image).exists()]
        for start in range(0, len(missing), self._batch_size):
            chunk = missing[start : start + self._batch_size]
            for image, feature in zip(chunk, self._compute(chunk).half().numpy(), strict=True):
                self._write(self._file(image), feature)
            if on_progress is not None:
                on_progress(len(chunk))
        return len(missing)

    def _file(self, image: Path) -> Path:
        if image not in self._keys:
            self._keys[image] = hashlib.sha256(self._version + image.read_bytes()).hexdigest()
        key = self._keys[image]
        return self._folder / key[:2] / f"{key}.npy"

    @staticmethod
    def _write(file: Path, feature: np.ndarray) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        with temporary.open("wb") as handle:
            np.save(handle, feature)
        os.replace(temporary, file)
