# SPDX-License-Identifier: Apache-2.0
"""Image features on disk by the image's content: computed once per content, processor, settings and arithmetic."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dmole.arithmetic import arithmetic, one_thread
from dmole.files import write_atomically
from dmole.machine import usable_cores

_DIGEST_BYTES = 32


class ImageFeatureCache:
    """One float16 array per image content: ``features(images)`` computes what is missing and reads the rest.

    Each image is computed alone and with one thread of torch, by as many workers as there are cores: a feature's bits
    depend on the image, on ``version`` and on ``arithmetic()`` alone, never on the images that it was first asked for
    with. The key is the SHA-256 of these three, so another image, another processor of images, and another CPU or torch
    (where a folder is shared) never meet an old entry.

    A file is the SHA-256 of an ``.npy`` array and then the array. A file whose digest is another one is computed again.
    Files appear by rename: processes may share the folder.

    Args:
        folder: Where the files are; made when the first one is written.
        version: Names the processor of images, its settings, its weights and its code.
        compute: Pixels [S, S, 3] uint8 -> feature [C, H, W]. It is called in several threads at once.
    """

    def __init__(self, folder: Path, version: str, compute: Callable[[np.ndarray], Tensor]):
        self._folder = folder
        self._version = version
        self._compute = compute

    def features(self, images: Sequence[np.ndarray]) -> Tensor:
        """[B, C, H, W] float32 for the images' pixels, in their order."""
        files = self._files(images)
        arrays: dict[Path, np.ndarray] = {}
        missing: dict[Path, np.ndarray] = {}
        for file, image in zip(files, images, strict=True):
            if file in arrays or file in missing:
                continue
            if (found := _read(file)) is None:
                missing[file] = image
            else:
                arrays[file] = found
        if missing:
            # `one_thread` here, besides the workers' own: torch hands the last number set to every new thread.
            with one_thread(), _workers(len(missing)) as pool:
                arrays.update(zip(missing, pool.map(self._make, missing, missing.values()), strict=True))
        return torch.from_numpy(np.stack([arrays[file] for file in files])).float()

    def _make(self, file: Path, image: np.ndarray) -> np.ndarray:
        # In the layout that the file gives back: a convolution of equal values in another layout has other bits.
        feature = self._compute(image).half().contiguous().numpy()
        _write(file, feature)
        return feature

    def _files(self, images: Sequence[np.ndarray]) -> list[Path]:
        # Every time: torch's precision settings may change between two calls.
        prefix = f"{self._version}\0{arithmetic()}\0"
        keys = [
            hashlib.sha256(f"{prefix}{image.dtype}{image.shape}\0".encode() + image.tobytes()).hexdigest()
            for image in images
        ]
        return [self._folder / key[:2] / f"{key}.feature" for key in keys]


def _workers(tasks: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(tasks, usable_cores()), initializer=torch.set_num_threads, initargs=(1,))


def _write(file: Path, feature: np.ndarray) -> None:
    body = io.BytesIO()
    np.save(body, feature)
    data = body.getvalue()
    write_atomically(file, hashlib.sha256(data).digest() + data, durable=False)


def _read(file: Path) -> np.ndarray | None:
    """The array of a file, or None if there is none or its digest is another one."""
    try:
        data = memoryview(file.read_bytes())
    except FileNotFoundError:
        return None
    if hashlib.sha256(data[_DIGEST_BYTES:]).digest() != data[:_DIGEST_BYTES]:
        return None
    array: np.ndarray = np.load(io.BytesIO(data[_DIGEST_BYTES:]), allow_pickle=False)
    return array
