# SPDX-License-Identifier: Apache-2.0
"""Which base model a folder or hub id is, without reading gigabytes.

    kind "headers"   sha256 of the index, of each safetensors header (names, types, shapes, places) and of file sizes
    kind "full"      sha256 of every weight file as well
    kind "tensors"   a model that was made in memory: sha256 of names, types, shapes and values

Two models with the same headers may hold other values: a hub id is told apart by its commit, a folder by "full".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CHUNK = 2**22
SMALL = 2**30


def base_identity(model: nn.Module, source: str, *, full: bool | None = None) -> dict[str, Any]:
    """The identity as JSON: "source", "kind", "commit" (of a hub id, else None) and "sha256".

    Args:
        source: the folder or hub id that the model was loaded from; "" hashes the tensors of the model.
        full: read every byte of the weights; None does so where they take at most 1 GiB.

    Raises:
        ValueError: for a source without safetensors.
    """
    if not source:
        return {"source": "", "kind": "tensors", "commit": None, "sha256": tensors_digest(model)}
    from transformers.utils.hub import extract_commit_hash

    files, index = weight_files(source)
    if full is None:
        full = sum(file.stat().st_size for file in files) <= SMALL
    digest = hashlib.sha256(index)
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        for part in _chunks(file) if full else [_header(file)]:
            digest.update(part)
    # Where the cache has the files; transformers puts the commit into no config that it read from the cache alone.
    commit = None if Path(source).is_dir() else extract_commit_hash(str(files[0]), None)
    return {"source": source, "kind": "full" if full else "headers", "commit": commit, "sha256": digest.hexdigest()}


def weight_files(source: str) -> tuple[list[Path], bytes]:
    """The safetensors of a folder or of a hub id in the cache, in order; the bytes of the index, or b""."""
    from transformers.utils.hub import cached_file

    def local(name: str) -> Path | None:
        found = cached_file(source, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)

    index = local(INDEX)
    names, text = [SINGLE], b""
    if index is not None:
        text = index.read_bytes()
        names = sorted(set(json.loads(text)["weight_map"].values()))
    files = [local(name) for name in names]
    missing = [name for name, file in zip(names, files, strict=True) if file is None]
    if missing:
        raise ValueError(
            f"model: {source!r} has no {missing[0]}; expected {SINGLE}, or {INDEX} and its files. Write the model with "
            f"save_pretrained, which makes safetensors."
        )
    return [file for file in files if file is not None], text


def weight_bytes(model: nn.Module) -> int:
    """What the parameters and buffers of the model take in memory."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def _header(file: Path) -> bytes:
    with file.open("rb") as opened:
        start = opened.read(8)
        return start + opened.read(int.from_bytes(start, "little"))


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            yield chunk


def tensors_digest(model: nn.Module) -> str:
    """The sha256 over every tensor of the model's state, by name: type, shape and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        plain = tensor.dequantize() if hasattr(tensor, "dequantize") and type(tensor) is not torch.Tensor else tensor
        digest.update(plain.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
