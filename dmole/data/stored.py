# SPDX-License-Identifier: Apache-2.0
"""Samples that stay on the disk: an Arrow file that `datasets` maps into memory, read row by row.

    memory of a split = its Arrow batches in use, whatever the number of rows

The file is in the cache under the digest of its bytes, so equal rows are written once, and processes that read the same
stream share it. A sample is made anew each time it is asked for and equals the one that an in-memory reading holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from dmole.cache import cache_folder
from dmole.data.sample import Rows, Sample, Turn

BATCH = 256
_LISTS = ("answers", "options", "entities")


class StoredSamples(Rows):
    """The samples of one Arrow file, in the order in which they were written."""

    def __init__(self, path: Path) -> None:
        from datasets import Dataset

        self.path = path
        self._rows = Dataset.from_file(str(path))

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, place: int) -> Sample:
        return _sample(self._rows[place])

    def __iter__(self) -> Iterator[Sample]:
        for batch in self._rows.with_format("arrow").iter(batch_size=BATCH):
            yield from map(_sample, batch.to_pylist())

    def __reduce__(self) -> tuple[type[StoredSamples], tuple[Path]]:
        return StoredSamples, (self.path,)


class SampleWriter:
    """Writes samples one by one; `samples` is what was written, once the `with` block has ended."""

    def __init__(self) -> None:
        from datasets import Features, List, Value
        from datasets.arrow_writer import ArrowWriter

        self._folder = cache_folder() / "rows"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._partial = self._folder / f"{secrets.token_hex(8)}.partial"
        text = Value("string")
        names = {name: List(text) for name in ("images", *_LISTS)}
        single = {name: text for name in ("id", "instruction", "turns", "taught")}
        features = Features({**single, **names})
        self._writer = ArrowWriter(path=str(self._partial), features=features, writer_batch_size=BATCH)
        self.count = 0

    def add(self, sample: Sample) -> None:
        """Write one sample."""
        self._writer.write(
            {
                "id": sample.id,
                "images": [str(image) for image in sample.images],
                "instruction": sample.instruction,
                "turns": json.dumps([[turn.role, list(turn.parts)] for turn in sample.turns]),
                "taught": sample.taught,
                **{name: list(getattr(sample, name)) for name in _LISTS},
            }
        )
        self.count += 1

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._writer.finalize()
        if kind is not None or self.count == 0:
            self._partial.unlink(missing_ok=True)
            return
        digest = hashlib.sha256()
        with self._partial.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        self._path = self._folder / f"{digest.hexdigest()}.arrow"
        os.replace(self._partial, self._path)

    @property
    def samples(self) -> StoredSamples | tuple[()]:
        return StoredSamples(self._path) if self.count else ()


def _sample(row: dict[str, Any]) -> Sample:
    return Sample(
        id=row["id"],
        images=tuple(map(Path, row["images"])),
        instruction=row["instruction"],
        turns=tuple(Turn(role=role, parts=tuple(parts)) for role, parts in json.loads(row["turns"])),
        taught=row["taught"],
        **{name: tuple(row[name]) for name in _LISTS},
    )
