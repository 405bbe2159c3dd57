# SPDX-License-Identifier: Apache-2.0
"""Rows on the disk: the same samples in the same order, in memory that does not grow with them."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from dmole.data import DataError, Sample, Turn, read_stream
from dmole.data.sample import joined
from dmole.data.stored import SampleWriter, StoredSamples


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DMOLE_CACHE", str(folder))
    return folder


def samples(count: int) -> list[Sample]:
    turns = (Turn(role="system", parts=("s",)), Turn(role="user", parts=(None, "two", None)))
    return [
        Sample(
            id=f"s{i}",
            images=(Path("/a.png"), Path(f"/{i}.png")),
            instruction="two\u2028\u00e9",
            answers=(f"a{i}", "b"),
            options=("x", "y") if i % 2 else (),
            entities=("e",),
            turns=turns if i % 3 == 0 else (),
            taught="all" if i % 3 == 0 else "last",
        )
        for i in range(count)
    ]


def stored(given: list[Sample]) -> StoredSamples:
    with SampleWriter() as writer:
        for sample in given:
            writer.add(sample)
    assert isinstance(writer.samples, StoredSamples)
    return writer.samples


def test_a_stored_sample_is_the_sample(cache: Path) -> None:
    given = samples(600)
    found = stored(given)
    assert len(found) == 600 and list(found) == given
    assert [found[0], found[599], found[-1]] == [given[0], given[599], given[-1]]
    assert found[250:260] == tuple(given[250:260]) and found[::300] == tuple(given[::300])
    with pytest.raises(IndexError):
        found[600]
    assert list(pickle.loads(pickle.dumps(found))) == given
    # Written once, however often it is read.
    stored(given)
    assert len(list((cache / "rows").iterdir())) == 1


def test_parts_are_joined_without_being_read() -> None:
    given = samples(10)
    both = joined([stored(given[:4]), (), given[4:7], stored(given[7:])])
    assert len(both) == 10 and [both[i] for i in range(10)] == given and both[-3:] == tuple(given[-3:])
    assert joined([given[:4], given[4:]]) == tuple(given)


def test_an_interrupted_writing_leaves_nothing(cache: Path) -> None:
    with pytest.raises(KeyboardInterrupt), SampleWriter() as writer:
        writer.add(samples(1)[0])
        raise KeyboardInterrupt
    assert list((cache / "rows").iterdir()) == []


def test_a_stream_on_the_disk_is_the_stream(toy_folder: Path) -> None:
    memory, disk = read_stream(toy_folder), read_stream(toy_folder, rows="disk")
    for one, other in zip(memory.tasks, disk.tasks, strict=True):
        assert isinstance(other.train, StoredSamples) and other.validation == ()
        assert tuple(other.train) == one.train and tuple(other.test) == one.test
    few, same = memory.limit(train=4).tasks[0].train, disk.limit(train=4).tasks[0].train
    assert tuple(same) == few and not isinstance(same, tuple)


def test_findings_are_the_same(toy_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    (folder / "t").mkdir(parents=True)
    (folder / "stream.yaml").write_text("name: s\ntasks:\n  - {name: t, metric: exact_match, directory: t}\n")
    row = {"id": "a", "images": [], "instruction": "i", "answers": ["x"]}
    lines = [row, row, {**row, "answers": [3]}, {**row, "id": "b", "images": ["none.png"]}]
    for split in ("train", "test"):
        (folder / "t" / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = []
    for rows in ("memory", "disk"):
        with pytest.raises(DataError) as caught:
            read_stream(folder, rows=rows)  # type: ignore[arg-type]
        found.append(caught.value.problems)
    assert found[0] == found[1] and len(found[0]) == 8


def test_images_are_checked_in_every_chunk(toy_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("dmole.data.reading.CHECKED_TOGETHER", 2)
    folder = tmp_path / "s"
    (folder / "t").mkdir(parents=True)
    (folder / "stream.yaml").write_text("name: s\ntasks:\n  - {name: t, metric: exact_match, directory: t}\n")
    sound = next((toy_folder / "colours").glob("*.png"))
    (folder / "t" / "sound.png").write_bytes(sound.read_bytes())
    (folder / "t" / "bad.png").write_bytes(b"no picture")
    names = ["sound.png", "sound.png", "sound.png", "bad.png", "bad.png", "sound.png", "bad.png"]
    for split in ("train", "test"):
        lines = [
            json.dumps({"id": f"{split}{i}", "image": name, "instruction": "i", "answers": ["x"]})
            for i, name in enumerate(names)
        ]
        (folder / "t" / f"{split}.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        read_stream(folder)
    places = [problem.partition(": ")[0] for problem in caught.value.problems]
    assert places == [f"t/{split}.jsonl:{line}" for split in ("train", "test") for line in (4, 5, 7)]


MEASURE = """
import json, pathlib, random, re, sys
from dmole.data.reading import read_stream
folder, rows, count = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
(folder / "t").mkdir(parents=True)
(folder / "stream.yaml").write_text("name: s\\ntasks:\\n  - {name: t, metric: exact_match, directory: t}\\n")
text = "word " * 800
for split, number in (("train", count), ("test", 5)):
    with (folder / "t" / f"{split}.jsonl").open("w") as file:
        for i in range(number):
            row = {"id": f"{split}{i}", "images": [], "instruction": f"{i} {text}", "answers": [f"a{i}"]}
            file.write(json.dumps(row) + "\\n")
def held():
    # Without the pages of mapped files, which the system takes back when it needs them.
    return int(re.search(r"^Anonymous:\\s+(\\d+)", pathlib.Path("/proc/self/smaps_rollup").read_text(), re.M)[1]) * 1024
train = read_stream(folder, rows=rows).tasks[0].train
order = random.Random(0).sample(range(len(train)), 1000)
digest = sum(int(train[place].id[5:]) * i for i, place in enumerate(order))
sum(1 for _ in train)
print(json.dumps([held(), digest, len(train)]))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's smaps_rollup")
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """4 KB a row: 15,000 more rows are 60 MB in memory and, from the disk, what allocators keep."""
    held = {}
    digests = {}
    for rows, count in (("memory", 5000), ("memory", 20000), ("disk", 5000), ("disk", 20000)):
        folder = tmp_path / f"{rows}{count}"
        command = [sys.executable, "-c", MEASURE, str(folder), rows, str(count)]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        held[rows, count], digests[rows, count], length = json.loads(answer.stdout)
        assert length == count
    more = {rows: held[rows, 20000] - held[rows, 5000] for rows in ("memory", "disk")}
    assert more["memory"] > 55e6, more
    assert more["disk"] < 10e6, more
    assert digests["memory", 20000] == digests["disk", 20000]
