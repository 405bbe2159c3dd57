# SPDX-License-Identifier: Apache-2.0
"""A file is written completely or not at all, by any number of writers."""

import errno
import os
import threading
from pathlib import Path

import pytest
import torch

from dmole.files import write_atomically, write_tensors


@pytest.mark.parametrize("durable", [True, False])
def test_writing_replaces_a_file_completely(durable: bool, tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_atomically(path, b"long content", durable=durable)
    write_atomically(path, b"short", durable=durable)
    assert path.read_bytes() == b"short"
    assert [found.name for found in path.parent.iterdir()] == ["file"]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have written before either renames: with one temporary name the second rename finds nothing."""
    path, together, replace = tmp_path / "row.json", threading.Barrier(2), os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (together.wait(10), replace(source, target)))
    errors: list[BaseException] = []

    def write(data: bytes) -> None:
        try:
            write_atomically(path, data)
        except OSError as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(data,)) for data in (b"a" * 10_000, b"b" * 10)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not errors
    assert path.read_bytes() in (b"a" * 10_000, b"b" * 10)
    assert [found.name for found in tmp_path.iterdir()] == ["row.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def refuse(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [found.name for found in tmp_path.iterdir()] == ["file"]


def test_tensors_that_the_disk_does_not_take_are_an_error_of_the_disk(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits of a process are POSIX")
    path = tmp_path / "weights.safetensors"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            write_tensors(path, {"a": torch.zeros(10**6)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(path) and caught.value.errno == errno.EFBIG
