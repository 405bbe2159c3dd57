# SPDX-License-Identifier: Apache-2.0
"""The files that a split may be in, and their rows one by one, whatever the size of the file.

    train.jsonl                                one JSON object a line; every line keeps its number
    train.parquet, train-00000-of-00002.parquet, data/train-*.parquet
    train/ with state.json                     `Dataset.save_to_disk`, `DatasetDict.save_to_disk`
    train/ with metadata.jsonl, .csv, .parquet pictures beside a table with `file_name`: imagefolder

All but JSON lines are read by `datasets`, as batches of Arrow rows of which no picture is decoded. A picture that is
stored in a table becomes a file of the cache, named by its content: everything after this module knows paths alone.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dmole.cache import cache_folder
from dmole.data.messages import RowPairs
from dmole.files import write_atomically

BATCH = 256
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Where the rows of a split are.

    Attributes:
        path: what messages name.
        files: its parts.
        folder: the task's, which paths of pictures in the rows are relative to.
    """

    kind: Literal["jsonl", "parquet", "saved", "imagefolder"]
    path: Path
    files: tuple[Path, ...]
    folder: Path


def tables_of(directory: Path, split: str) -> list[Table]:
    """Every table that could be the split `split` of the task in `directory`; a sound task has one or none."""
    found = []
    lines = directory / f"{split}.jsonl"
    if lines.is_file():
        found.append(Table(kind="jsonl", path=lines, files=(lines,), folder=directory))
    for place in (directory, directory / "data"):
        parts = sorted({*place.glob(f"{split}.parquet"), *place.glob(f"{split}-*-of-*.parquet")})
        if parts:
            name = parts[0] if len(parts) == 1 else place / f"{split}-*.parquet"
            found.append(Table(kind="parquet", path=name, files=tuple(parts), folder=directory))
    folder = directory / split
    if (folder / "state.json").is_file():
        found.append(Table(kind="saved", path=folder, files=(folder,), folder=directory))
    elif any((folder / name).is_file() for name in _METADATA):
        found.append(Table(kind="imagefolder", path=folder, files=(folder,), folder=directory))
    return found


def table_rows(table: Table) -> Iterator[tuple[int, RowPairs]]:
    """(number from 1, row) of a table that is not JSON lines. Cells without a value are left out.

    Raises OSError or ValueError for a table that cannot be read.
    """
    import datasets

    number = 0
    with _quiet():
        if table.kind == "saved":
            source = datasets.load_from_disk(str(table.path))
        else:
            # Patterns: without them, the library guesses the split from the folder's name.
            rest = "/**" if table.kind == "imagefolder" else ""
            source = datasets.load_dataset(
                table.kind,
                data_files={"train": [glob.escape(str(file)) + rest for file in table.files]},
                split="train",
                streaming=True,
                cache_dir=str(cache_folder() / "datasets"),
            )
        for batch in source.with_format("arrow").iter(batch_size=BATCH):
            for row in batch.to_pylist():
                number += 1
                yield number, _pairs(row)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """`datasets` logs an error that it raises too."""
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _pairs(row: dict[str, Any]) -> RowPairs:
    return RowPairs((key, _plain(value)) for key, value in row.items() if value is not None)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) <= {"bytes", "path"} and value:
            return value.get("path") if value.get("bytes") is None else str(_kept_picture(value["bytes"]))
        return _pairs(value)
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _kept_picture(data: bytes) -> Path:
    """The file in the cache that holds these bytes."""
    digest = hashlib.sha256(data).hexdigest()
    path = cache_folder() / "pictures" / digest[:2] / digest
    if not path.exists():
        write_atomically(path, data, durable=False)
    return path
