# SPDX-License-Identifier: Apache-2.0
"""What was met before among any number of texts, such as ids: a table that SQLite moves to the disk as it grows."""

from __future__ import annotations

import hashlib
import sqlite3


class Seen:
    """What was met before, in a table that SQLite moves to the disk as it grows."""

    def __init__(self) -> None:
        self._table = sqlite3.connect("")
        self._table.execute("CREATE TABLE seen (key BLOB PRIMARY KEY, place TEXT) WITHOUT ROWID")

    def __enter__(self) -> Seen:
        return self

    def __exit__(self, *_: object) -> None:
        self._table.close()

    def first(self, kind: str, text: str, place: str) -> str | None:
        """Where (kind, text) was met first; None, and `place` is kept, if this is the first time."""
        key = _seen_key(kind, text)
        if self._table.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, place)).rowcount:
            return None
        return self._place(key)

    def known(self, kind: str, text: str) -> bool:
        """Whether (kind, text) was met."""
        return self._place(_seen_key(kind, text)) is not None

    def _place(self, key: bytes) -> str | None:
        found = self._table.execute("SELECT place FROM seen WHERE key = ?", (key,)).fetchone()
        return None if found is None else str(found[0])


def _seen_key(kind: str, text: str) -> bytes:
    return hashlib.sha256(f"{kind}\0{text}".encode("utf-8", "surrogatepass")).digest()[:16]
