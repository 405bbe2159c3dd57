# SPDX-License-Identifier: Apache-2.0
"""Files that appear completely or not at all, also where several processes write the same one; digests of files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

JSON = Any  # what json.dumps takes: dict, list, str, int, float, bool, None


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """`data` in the file `path`: completely or not at all, whatever other processes write there meanwhile.

    durable: wait until the data is on the disk (milliseconds). Without it a power failure can leave a damaged file, so
    it is for files whose readers check a digest.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own for every writer: two writers of one temporary file would mix their data.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(partial, path)
        if durable:
            sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk: without it a power failure can undo a rename."""
    if os.name == "nt":
        return  # folders cannot be opened there
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(partial: Path, folder: Path) -> None:
    """Rename a folder whose files are on the disk to its real name, which is free; a power failure undoes nothing."""
    sync_folder(partial)
    os.rename(partial, folder)
    sync_folder(folder.parent)


def write_json(path: Path, document: JSON) -> None:
    """Indented JSON, atomically."""
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Tensors as safetensors; an error of the disk is an OSError with the file's name, as of every other write."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code) if number else str(error), str(path)) from error


def file_digest(path: Path) -> str:
    """The sha256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(2**20):
            digest.update(data)
    return digest.hexdigest()


def synced_digest(path: Path) -> str:
    """The same, once the file's data is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return file_digest(path)


def sealed_digest(body: JSON) -> str:
    """The sha256 of a document without its own seal."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
