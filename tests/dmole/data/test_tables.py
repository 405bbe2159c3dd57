# SPDX-License-Identifier: Apache-2.0
"""Parquet, saved data sets and picture folders give the samples that JSON lines give, and are checked like them."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dmole.data import DataError, Sample, read_stream

Write = Callable[[Path, str, list[dict[str, Any]]], None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DMOLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rows(split: str) -> list[dict[str, Any]]:
    return [
        {"id": f"{split}{i}", "images": [f"{i}.png"] if i else [], "instruction": "What?", "answers": [f"word {i}"]}
        for i in range(3)
    ]


# A folder's name may look like a pattern.
ODD = "my [s] *"


def stream(folder: Path, write: Write) -> Path:
    (folder / "t").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (8, 8), (80 * i, 9, 9)).save(folder / "t" / f"{i}.png")
    (folder / "stream.yaml").write_text("name: s\ntasks:\n  - {name: t, metric: exact_match, directory: t}\n")
    for split in ("train", "test"):
        write(folder / "t", split, rows(split))
    return folder


def json_lines(directory: Path, split: str, given: list[dict[str, Any]]) -> None:
    (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))


def parquet(directory: Path, split: str, given: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(given), directory / f"{split}.parquet")


def shards(directory: Path, split: str, given: list[dict[str, Any]]) -> None:
    (directory / "data").mkdir(exist_ok=True)
    for number, part in enumerate((given[:2], given[2:])):
        path = directory / "data" / f"{split}-{number:05d}-of-00002.parquet"
        pq.write_table(pa.Table.from_pylist(part, schema=pa.Table.from_pylist(given).schema), path)


def saved(directory: Path, split: str, given: list[dict[str, Any]]) -> None:
    # Paths are relative to the task's folder, as in every other file of it.
    datasets.Dataset.from_list(given).save_to_disk(directory / split)


@pytest.mark.parametrize("write", [parquet, shards, saved])
def test_a_table_gives_what_json_lines_give(tmp_path: Path, write: Write) -> None:
    lines, table = stream(tmp_path / "a", json_lines), stream(tmp_path / ODD, write)
    expected, found = read_stream(lines).tasks[0], read_stream(table).tasks[0]

    def moved(samples: Any) -> list[Sample]:
        return [
            Sample(id=s.id, images=tuple(Path(p.name) for p in s.images), instruction=s.instruction, answers=s.answers)
            for s in samples
        ]

    assert moved(found.train) == moved(expected.train) and moved(found.test) == moved(expected.test)
    assert found.train[1].images == (table / "t" / "1.png",)


def test_pictures_inside_a_table_become_files_by_content(tmp_path: Path, cache: Path) -> None:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(data, "PNG")
    picture = {"bytes": data.getvalue(), "path": None}
    talk = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Grey."}]},
    ]

    def write(directory: Path, split: str, given: list[dict[str, Any]]) -> None:
        parquet(directory, split, [{"messages": talk, "images": [picture]}] * 2)

    task = read_stream(stream(tmp_path / ODD, write)).tasks[0]
    assert [sample.id for sample in task.train] == ["train-1", "train-2"]
    (path,) = task.train[0].images
    assert path.read_bytes() == data.getvalue() and path.is_relative_to(cache)
    assert task.test[0].images == (path,) and task.train[0].turns == ()


def test_a_data_set_dict_of_pictures(tmp_path: Path) -> None:
    def write(directory: Path, split: str, given: list[dict[str, Any]]) -> None:
        if split == "test":
            return
        shown = [{**row, "images": [str(directory / name) for name in row["images"]]} for row in given]
        made = datasets.Dataset.from_list(shown).cast_column("images", datasets.List(datasets.Image()))
        datasets.DatasetDict({"train": made, "test": made}).save_to_disk(directory)

    folder = stream(tmp_path / ODD, write)
    # The ids of the test are those of the training rows.
    with pytest.raises(DataError, match=r"t/test:1: id 'train0' is already used in train:1; ids are unique"):
        read_stream(folder)


def test_a_picture_folder(tmp_path: Path) -> None:
    def write(directory: Path, split: str, given: list[dict[str, Any]]) -> None:
        folder = directory / split
        folder.mkdir()
        lines = []
        for row in given:
            Image.new("RGB", (8, 8), (3, 3, 3)).save(folder / f"{row['id']}.png")
            fields = {key: value for key, value in row.items() if key != "images"}
            lines.append(json.dumps({**fields, "file_name": f"{row['id']}.png"}) + "\n")
        (folder / "metadata.jsonl").write_text("".join(lines))

    task = read_stream(stream(tmp_path / ODD, write)).tasks[0]
    assert [s.id for s in task.train] == ["train0", "train1", "train2"]
    assert task.train[0].images == (tmp_path / ODD / "t" / "train" / "train0.png",)


def test_rows_of_a_table_are_found_by_number(tmp_path: Path) -> None:
    def write(directory: Path, split: str, given: list[dict[str, Any]]) -> None:
        parquet(directory, split, [given[0], {**given[1], "images": ["none.png"]}, {**given[2], "answers": [" "]}])

    with pytest.raises(DataError) as caught:
        read_stream(stream(tmp_path / ODD, write))
    assert [problem for problem in caught.value.problems if "train" in problem] == [
        "t/train.parquet:3: answers[0] is empty; expected some text",
        "t/train.parquet:2: image none.png is missing; paths are relative to the .jsonl file",
    ]


@pytest.mark.parametrize("content", [b"", b"PAR1junkPAR1", b"not parquet"])
def test_a_damaged_table_is_a_finding(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = stream(tmp_path / ODD, json_lines)
    (folder / "t" / "train.jsonl").unlink()
    (folder / "t" / "train.parquet").write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_stream(folder)
    (problem,) = caught.value.problems
    assert problem.startswith("t/train.parquet: cannot be read (")
    # The library says it too, once more and without the name of the task.
    assert capsys.readouterr().err == "" and not caplog.records


def test_a_split_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = stream(tmp_path / ODD, json_lines)
    parquet(folder / "t", "train", rows("train"))
    with pytest.raises(DataError, match=r"t/train.jsonl: the train split is also in train.parquet; expected one"):
        read_stream(folder)
