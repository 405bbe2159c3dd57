# SPDX-License-Identifier: Apache-2.0
"""What a line can hold and no run can, found by file and line; and what test splits share with other splits."""

import json
from pathlib import Path

import pytest
from PIL import Image

from dmole.cli import status
from dmole.data import DataError, read_stream
from dmole.data.leaks import LeakFinder

GOOD = '{"id": "g%d", "image": "%d.png", "instruction": "Question %d?", "answers": ["b"]}\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    for i in range(5):
        Image.new("RGB", (4, 4), (50 * i, 0, 0)).save(tmp_path / "a" / f"{i}.png")
    (tmp_path / "stream.yaml").write_text("name: s\ntasks:\n- {name: a, metric: exact_match, directory: a}\n")
    (tmp_path / "a" / "train.jsonl").write_text("".join(GOOD % (i, i, i) for i in range(2)))
    (tmp_path / "a" / "test.jsonl").write_text(GOOD % (9, 4, 9))
    return tmp_path


def _line(**changes: object) -> bytes:
    row = {"id": "x", "image": "0.png", "instruction": "?", "answers": ["b"], **changes}
    return json.dumps(row).encode()


@pytest.mark.parametrize(
    ("line", "finding"),
    [
        (_line(answers=["\ud83d"]), r"answers[0] holds half of a surrogate pair ('\ud83d' at character 1)"),
        (_line(id="a\udc00"), r"id holds half of a surrogate pair"),
        (_line(image="\ud83d.png"), "image holds half of a surrogate pair"),
        (_line(**{"\ud83d": 1}), "key 5 holds half of a surrogate pair"),
        (_line(instruction="a\0b"), "instruction holds the character NUL at character 2"),
        (_line().replace(b'"b"', b"9" * 5000), "holds an integer of 5000 digits; expected at most 19"),
        (_line().replace(b'"b"', b"NaN"), "is not JSON: it holds NaN, which JSON has not"),
        (_line().replace(b'"b"', b"-Infinity"), "is not JSON: it holds -Infinity"),
        (_line(image="n" * 300), "image has a name of 300 bytes; expected at most 255"),
        (_line(image="n/" * 2500), "image is a path of 5000 bytes; expected at most 4095"),
        (_line(image="data:image/png;base64,iVBO"), "image is a data URI; expected the path of a file"),
        (_line(image="https://a.b/c.png"), "image is a https: address; expected the path of a file"),
        (b"\xef\xbb\xbf" + _line(), "is not JSON: Unexpected UTF-8 BOM"),
        (b'{"id": "a", ' + _line()[1:], "key 'id' is given twice"),
        (b"[" * 100_000, "JSON nested too deeply"),
    ],
)
def test_a_line_that_no_run_can_hold_is_found(line: bytes, finding: str, folder: Path) -> None:
    file = folder / "a" / "train.jsonl"
    file.write_bytes(file.read_bytes() + line + b"\n")
    with pytest.raises(DataError) as caught:
        read_stream(folder)
    assert any(found.startswith("a/train.jsonl:3: ") and finding in found for found in caught.value.problems)
    assert str(caught.value).isascii()


def test_a_byte_order_mark_before_a_blank_line_is_no_finding(folder: Path) -> None:
    file = folder / "a" / "train.jsonl"
    file.write_bytes(b"\xef\xbb\xbf\n" + file.read_bytes())
    assert len(read_stream(folder).tasks[0].train) == 2


@pytest.mark.parametrize(
    ("line", "finding"),
    [
        ('- {name: a, metric: exact_match, directory: "\\ud83d"}', "half of a surrogate pair"),
        ("- {name: a, metric: exact_match, directory: " + "n" * 300 + "}", "directory has a name of 300 bytes"),
        ("- {name: " + "n" * 300 + ", metric: exact_match, directory: a}", "name has a name of 300 bytes"),
        ("- {name: !!bool x, metric: exact_match, directory: a}", "holds a tag"),
        ("- " + "[" * 100_000, "nesting deeper"),
    ],
)
def test_a_stream_file_that_no_run_can_hold_is_found(line: str, finding: str, folder: Path) -> None:
    (folder / "stream.yaml").write_text(f"name: s\ntasks:\n{line}\n")
    with pytest.raises(DataError) as caught:
        read_stream(folder)
    assert caught.value.problems[0].startswith("stream.yaml:3: ") and finding in caught.value.problems[0]


def test_all_findings_are_shown_on_request(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a" / "train.jsonl").write_text("{}\n" * 30)
    assert status(["tasks", "check", str(folder)]) == 2
    first = capsys.readouterr().err
    assert status(["tasks", "check", "--all", str(folder)]) == 2
    every = capsys.readouterr().err
    assert "a/train.jsonl:30: " in every and "a/train.jsonl:30: " not in first
    assert "more (dmole tasks check --all shows them)" in first and "more (" not in every


def test_leaks_name_both_places(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(["tasks", "check", str(folder)]) == 0
    assert (
        "leaks (entities, image bytes, question with images, across splits and tasks): none" in capsys.readouterr().out
    )
    # The same bytes under another name; the same entity; the same question.
    (folder / "a" / "4.png").write_bytes((folder / "a" / "1.png").read_bytes())
    row = {"id": "t", "image": "4.png", "instruction": "Question 1?", "answers": ["b"], "entities": ["e"]}
    (folder / "a" / "test.jsonl").write_text("\n" + json.dumps(row) + "\n")
    row.update(id="u", image="0.png", instruction="Other?")
    with (folder / "a" / "train.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    assert status(["tasks", "check", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("leak: ")] == [
        "leak: a/test.jsonl:2: entity 'e' is also in a/train.jsonl:3",
        "leak: a/test.jsonl:2: image 4.png is also in a/train.jsonl:2",
        "leak: a/test.jsonl:2: the question of 't' with its images is also in a/train.jsonl:2",
    ]
    assert lines[-1] == "s: 1 task, 3 leaks"


def test_a_question_of_two_tasks_is_a_leak_and_a_shared_training_image_is_none(folder: Path) -> None:
    with (folder / "stream.yaml").open("a") as file:
        file.write("- {name: b, metric: exact_match, directory: b}\n")
    (folder / "b").mkdir()
    again = (folder / "a" / "train.jsonl").read_text().replace('"image": "', '"image": "../a/')
    (folder / "b" / "train.jsonl").write_text(again.replace("Question 0", "Another"))
    (folder / "b" / "test.jsonl").write_text((GOOD % (9, 3, 3)).replace("3.png", "../a/3.png"))
    leaks = LeakFinder()
    read_stream(folder, leaks=leaks)
    assert leaks.found == ["b/train.jsonl:2: the question of 'g1' with its images is also in a/train.jsonl:2"]
