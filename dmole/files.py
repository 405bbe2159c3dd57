# SPDX-License-Identifier: Apache-2.0
"""Files that appear completely or not at all, also where several processes write the same one."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

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
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, document: JSON) -> None:
    """Indented JSON, atomically."""
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())
