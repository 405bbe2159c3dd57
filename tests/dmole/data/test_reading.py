# SPDX-License-Identifier: Apache-2.0
"""Streams read from real files, and every kind of damage found by file and line before anything else happens."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dmole.data import DataError, Sample, Stream, read_stream
from dmole.metrics import METRICS


def row(index: int, **changes: Any) -> dict[str, Any]:
    """One line of a caption task; `changes` replaces keys, None removes them."""
    fields: dict[str, Any] = {
        "id": f"s{index}",
        "image": f"images/{index % 4}.png",
        "instruction": "Describe the image.",
        "answers": [f"a red square number {index}", "a square"],
    }
    fields.update(changes)
    return {key: value for key, value in fields.items() if value is not None}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    """A valid stream of one caption task and one multiple-choice task, with real PNG and JPEG files."""
    folder = tmp_path / "stream"
    for task in ("captions", "questions"):
        (folder / task / "images").mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (24, 24), (40 * i, 90, 200)).save(folder / task / "images" / f"{i}.png")
    Image.effect_noise((48, 48), 60).convert("RGB").save(folder / "captions" / "images" / "photo.jpg")
    (folder / "stream.yaml").write_text(
        "name: small\n"
        "tasks:\n"
        "  - {name: captions, metric: cider, directory: captions}\n"
        "  - name: questions\n"
        "    metric: option_letter\n"
        "    directory: questions\n"
    )
    write_jsonl(
        folder / "captions" / "train.jsonl", [row(0), row(1), row(2, image="images/photo.jpg", entities=["e/1"])]
    )
    write_jsonl(folder / "captions" / "validation.jsonl", [row(5)])
    write_jsonl(folder / "captions" / "test.jsonl", [row(10), row(11)])
    choice = {"instruction": "Which?\nA. cat\nB. dog", "answers": ["B"], "options": ["cat", "dog"]}
    write_jsonl(folder / "questions" / "train.jsonl", [row(0, **choice), row(1, **choice)])
    write_jsonl(folder / "questions" / "test.jsonl", [row(2, **choice)])
    return folder


def problems(folder: Path, **options: bool) -> list[str]:
    """The findings of a reading that must fail."""
    with pytest.raises(DataError) as caught:
        read_stream(folder, **options)
    assert isinstance(caught.value, ValueError)
    assert f"in the data set {folder}" in str(caught.value)
    return list(caught.value.problems)


def test_a_valid_stream_is_read_whole(stream: Path) -> None:
    read = read_stream(stream)
    assert isinstance(read, Stream) and read.name == "small" and read.task_names == ("captions", "questions")
    captions, questions = read.tasks
    assert [len(s) for s in (captions.train, captions.validation, captions.test)] == [3, 1, 2]
    assert questions.validation == () and questions.metric == "option_letter"
    assert captions.train[2] == Sample(
        id="s2",
        images=(stream / "captions" / "images" / "photo.jpg",),
        instruction="Describe the image.",
        answers=("a red square number 2", "a square"),
        entities=("e/1",),
    )
    assert questions.test[0].options == ("cat", "dog")


def test_a_sample_may_have_several_images_or_none(stream: Path) -> None:
    images = ["images/photo.jpg", "images/1.png"]
    lines = [json.dumps(row(0, image=None, images=images)), json.dumps(row(1, image=None, images=[]))]
    (stream / "captions" / "train.jsonl").write_text("\n".join(lines) + "\n")
    several, none = read_stream(stream).tasks[0].train
    assert [image.name for image in several.images] == ["photo.jpg", "1.png"] and none.images == ()


def test_blank_lines_a_bom_and_line_separators_inside_strings_are_fine(stream: Path) -> None:
    lines = [json.dumps(row(i, instruction="one\u2028two"), ensure_ascii=False) for i in range(2)]
    (stream / "captions" / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(lines).encode() + b"\n\n")
    assert [s.instruction for s in read_stream(stream).tasks[0].train] == ["one\u2028two"] * 2


Damage = Callable[[Path], None]


def captions_line(text: str | bytes) -> Damage:
    """Put `text` after the first line of captions/train.jsonl: it becomes line 2."""

    def damage(folder: Path) -> None:
        path = folder / "captions" / "train.jsonl"
        first, rest = path.read_bytes().split(b"\n", 1)
        path.write_bytes(first + b"\n" + (text.encode() if isinstance(text, str) else text) + b"\n" + rest)

    return damage


def captions_row(**changes: Any) -> Damage:
    return captions_line(json.dumps(row(77, **changes)))


def truncated_jpeg(folder: Path) -> None:
    path = folder / "captions" / "images" / "photo.jpg"
    path.write_bytes(path.read_bytes()[:-400])


def text_as_png(folder: Path) -> None:
    (folder / "captions" / "images" / "1.png").write_text("not a picture")


def broken_png(folder: Path) -> None:
    path = folder / "captions" / "images" / "1.png"
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 6] ^= 0xFF
    path.write_bytes(bytes(data))


def truncated_png(folder: Path) -> None:
    # Only the last chunk is cut: every pixel is still there, and the file is damaged all the same.
    path = folder / "captions" / "images" / "1.png"
    path.write_bytes(path.read_bytes()[:-12])


def empty_image(folder: Path) -> None:
    (folder / "captions" / "images" / "1.png").write_bytes(b"")


def write(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text) and None


def replace_in_yaml(old: str, new: str) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "stream.yaml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return damage


def question_row(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "questions" / "test.jsonl"
        fields = row(9, **{"answers": ["B"], "options": ["cat", "dog"], **changes})
        path.write_text(path.read_text() + json.dumps(fields) + "\n")

    return damage


AT = "captions/train.jsonl:2: "
CASES: dict[str, tuple[Damage, str]] = {
    # images
    "missing image": (captions_row(image="images/none.png"), AT + "image images/none.png is missing"),
    "image outside": (captions_row(image="../../x.png"), "is missing; paths are relative to the .jsonl file"),
    "image is a folder": (captions_row(image="images"), AT + "image images is missing"),
    "truncated jpeg": (
        truncated_jpeg,
        "captions/train.jsonl:3: image images/photo.jpg cannot be decoded (OSError: image file is truncated",
    ),
    "text as png": (
        text_as_png,
        "captions/train.jsonl:2: image images/1.png cannot be decoded (UnidentifiedImageError",
    ),
    "broken png": (broken_png, "captions/train.jsonl:2: image images/1.png cannot be decoded ("),
    "truncated png": (truncated_png, "captions/train.jsonl:2: image images/1.png cannot be decoded ("),
    "empty image": (empty_image, "captions/train.jsonl:2: image images/1.png cannot be decoded ("),
    # answers
    "answer a number": (captions_row(answers=[3]), AT + "answers[0] is the number 3; expected a string"),
    "answer null": (captions_row(answers=["a cat", None]), AT + "answers[1] is null; expected a string"),
    "answer a list": (captions_row(answers=[["a"]]), AT + "answers[0] is a list; expected a string"),
    "answers a string": (captions_row(answers="cat"), AT + "answers is the string 'cat'; expected a list of strings"),
    "answers an object": (captions_row(answers={"a": 1}), AT + "answers is an object; expected a list of strings"),
    "no answers": (captions_row(answers=[]), AT + "answers has 0 entries; expected at least 1"),
    "empty answer": (captions_row(answers=["  "]), AT + "answers[0] is empty; expected some text"),
    "caption without words": (captions_row(answers=["..."]), AT + "answers[0] is '...', which has no words"),
    # options
    "options without the answer": (
        captions_row(answers=["cow"], options=["cat", "dog"]),
        AT + "options ['cat', 'dog'] do not hold the answer 'cow'; expected the letter or the text of an option",
    ),
    "letter beyond the options": (
        question_row(answers=["C"]),
        "questions/test.jsonl:2: answers is ['C']; expected exactly one of the option letters A, B (2 options are",
    ),
    "options missing": (
        question_row(options=None),
        "questions/test.jsonl:2: options is missing; the metric option_letter",
    ),
    "one option": (question_row(options=["cat"]), "questions/test.jsonl:2: options has 1 entries; expected at least 2"),
    "option twice": (question_row(options=["cat", "cat"]), "questions/test.jsonl:2: options holds a text twice"),
    "too many options": (
        question_row(options=[str(i) for i in range(27)]),
        "options has 27 entries; expected at most 26",
    ),
    # lines
    "bad json": (captions_line('{"id": "x",'), AT + "is not JSON: "),
    "two objects": (captions_line("{} {}"), AT + "is not JSON: Extra data at column 4"),
    "a list": (captions_line("[1, 2]"), AT + "is a list; expected one JSON object per line"),
    "a string": (captions_line('"x"'), AT + "is the string 'x'; expected one JSON object per line"),
    "not utf-8": (captions_line(b'{"id": "\xff"}'), AT + "is not UTF-8 text (invalid start byte at byte 8)"),
    "nested too deeply": (captions_line("[" * 200_000), AT + "is not "),
    "unknown key": (
        captions_row(answer="cat"),
        AT + "unknown key 'answer'; expected id, image, images, instruction, answers, options, entities "
        "(did you mean 'answers'?)",
    ),
    "no image": (captions_row(image=None), AT + "key 'image' is missing; expected a path, or images: a list of paths"),
    "image and images": (captions_row(images=["images/1.png"]), AT + "has both keys image and images; expected one"),
    "images is no list": (captions_row(image=None, images="images/1.png"), AT + "images is the string 'images/1.png'"),
    "a missing image of several": (
        captions_row(image=None, images=["images/1.png", "images/none.png"]),
        AT + "image images/none.png is missing; paths are relative to the .jsonl file",
    ),
    "missing key": (captions_row(instruction=None), AT + "key 'instruction' is missing"),
    "key twice": (
        captions_line('{"id": "x", "id": "y", "image": "images/1.png", "instruction": "i", "answers": ["a"]}'),
        AT + "key 'id' is given twice",
    ),
    "id a number": (captions_row(id=7), AT + "id is the number 7; expected a string"),
    "empty instruction": (captions_row(instruction=" "), AT + "instruction is empty; expected some text"),
    "image true": (captions_row(image=True), AT + "image is true; expected a string"),
    "duplicate id": (captions_row(id="s0"), AT + "id 's0' is already used in train.jsonl:1"),
    "entities a string": (captions_row(entities="e"), AT + "entities is the string 'e'; expected a list of strings"),
    # splits
    "one training sample": (
        write("captions/train.jsonl", json.dumps(row(0))),
        "captions/train.jsonl: the train split has 1 sample; task 'captions' needs at least 2",
    ),
    "empty train split": (
        write("captions/train.jsonl", "\n"),
        "captions/train.jsonl: the train split is empty; task 'captions' needs at least 2",
    ),
    "empty test split": (
        write("questions/test.jsonl", ""),
        "questions/test.jsonl: the test split is empty; the metric option_letter of task 'questions' needs at least 1",
    ),
    "one test caption": (
        write("captions/test.jsonl", json.dumps(row(10))),
        "captions/test.jsonl: the test split has 1 sample; the metric cider of task 'captions' needs at least 2",
    ),
    "no test file": (
        lambda folder: (folder / "captions" / "test.jsonl").unlink(),
        "captions/test.jsonl: file is missing; task 'captions' needs a test split",
    ),
    # stream.yaml
    "unknown metric": (
        replace_in_yaml("metric: option_letter", "metric: option_leter"),
        f"stream.yaml:5: metric is 'option_leter'; expected one of {', '.join(METRICS)} (did you mean 'option_letter'",
    ),
    "unknown task key": (
        replace_in_yaml("    directory", "    folder"),
        "stream.yaml:6: unknown key 'folder'; expected name, metric, directory",
    ),
    "missing task key": (
        replace_in_yaml("    directory: questions\n", ""),
        "stream.yaml:4: key 'directory' is missing",
    ),
    "unknown top key": (
        replace_in_yaml("name: small", "name: small\ntaks: 1"),
        "stream.yaml:2: unknown key 'taks'; expected name, tasks (did you mean 'tasks'?)",
    ),
    "task twice": (
        replace_in_yaml("name: questions", "name: captions"),
        "stream.yaml:4: task 'captions' is already defined on line 3",
    ),
    "bad task name": (
        replace_in_yaml("name: questions", "name: my questions"),
        "stream.yaml:4: name is 'my questions'; expected letters, digits",
    ),
    "reserved task name": (
        replace_in_yaml("name: questions", "name: stage"),
        "stream.yaml:4: name is 'stage', a word of the result tables",
    ),
    "missing directory": (
        replace_in_yaml("directory: questions", "directory: question"),
        "stream.yaml:4: task 'questions': directory 'question' is missing",
    ),
    "no tasks": (write("stream.yaml", "name: x\ntasks: []\n"), "stream.yaml:2: tasks is missing or empty"),
    "tasks missing": (write("stream.yaml", "name: x\n"), "stream.yaml:1: tasks is missing or empty"),
    "task a string": (write("stream.yaml", "name: x\ntasks: [a]\n"), "stream.yaml:2: expected a task like"),
    "yaml broken": (write("stream.yaml", "name: x\ntasks: [a\n"), "stream.yaml:3: is not YAML"),
    "yaml a list": (write("stream.yaml", "- 1\n"), "stream.yaml:1: expected the keys name and tasks"),
    "yaml empty": (write("stream.yaml", ""), "stream.yaml:1: expected the keys name and tasks"),
    "yaml name a list": (replace_in_yaml("name: small", "name: [small]"), "stream.yaml:1: name is not a text"),
    "no stream.yaml": (
        lambda folder: (folder / "stream.yaml").unlink(),
        "stream.yaml: file is missing; a data set is a folder",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_damage_is_found_by_file_and_line(stream: Path, case: str) -> None:
    damage, expected = CASES[case]
    damage(stream)
    found = problems(stream)
    assert len([p for p in found if expected in p]) == 1, found
    # One fault is one finding, except where it makes others true (two keys missing by one wrong name).
    assert len(found) <= 2, found


def test_binary_stream_file(stream: Path) -> None:
    (stream / "stream.yaml").write_bytes(b"name: \xff\n")
    assert problems(stream) == ["stream.yaml: is not UTF-8 text (invalid start byte at byte 6); save it as UTF-8"]


def test_all_problems_are_collected_and_the_text_is_capped(stream: Path) -> None:
    bad = [row(100 + i, answers=[i]) for i in range(30)]
    write_jsonl(stream / "captions" / "train.jsonl", bad)
    captions_row(image="images/none.png")(stream)
    (stream / "questions" / "test.jsonl").write_text("")
    with pytest.raises(DataError) as caught:
        read_stream(stream)
    assert len(caught.value.problems) == 32
    lines = str(caught.value).splitlines()
    assert lines[0] == f"32 problems in the data set {stream}:"
    assert caught.value.text().splitlines() == [lines[0], *caught.value.problems]
    assert len(lines) == 22 and lines[-1] == "... and 12 more (dmole tasks check --all shows them)"


def test_duplicate_ids_are_found_between_splits_but_not_between_tasks(stream: Path) -> None:
    write_jsonl(stream / "captions" / "validation.jsonl", [row(1)])
    found = problems(stream)
    assert found == ["captions/validation.jsonl:1: id 's1' is already used in train.jsonl:2; ids are unique in a task"]


def test_vqa_needs_ten_annotators_where_it_is_scored(stream: Path) -> None:
    replace_in_yaml("metric: cider", "metric: vqa")(stream)
    found = problems(stream)
    assert [p.split(": ")[0] for p in found] == [
        "captions/validation.jsonl:1",
        "captions/test.jsonl:1",
        "captions/test.jsonl:2",
    ]
    assert "answers has 2 entries; the metric vqa needs the 10 annotators' answers" in found[0]


def test_a_split_is_checked_as_a_whole(stream: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(stream / "captions" / "test.jsonl", [row(10, answers=["a square"]), row(11, answers=["A square."])])
    found = problems(stream)
    assert len(found) == 1 and found[0].startswith("captions/test.jsonl: all 2 test samples have the same references")
    replace_in_yaml("metric: cider", "metric: rouge_l")(stream)
    monkeypatch.setattr("dmole.metrics.base.find_spec", lambda name: None)
    assert problems(stream) == [
        "captions/test.jsonl: the metric rouge_l needs the package rapidfuzz, which is not installed; run pip install "
        "'dmole[metrics]'"
    ]


def test_boxes_are_checked(stream: Path) -> None:
    replace_in_yaml("metric: cider", "metric: iou")(stream)
    for split, first in (("train", 0), ("validation", 5), ("test", 10)):
        write_jsonl(stream / "captions" / f"{split}.jsonl", [row(first + i, answers=["1 2 3 4"]) for i in range(2)])
    read_stream(stream)
    captions_row(answers=["1 2 3"])(stream)
    assert problems(stream)[0].startswith(
        "captions/train.jsonl:2: answers[0] is '1 2 3'; expected a box like '10 20 55 80'"
    )


def test_unchecked_images_must_still_exist(stream: Path) -> None:
    text_as_png(stream)
    read_stream(stream, check_images=False)
    (stream / "captions" / "images" / "1.png").unlink()
    assert "image images/1.png is missing" in problems(stream, check_images=False)[0]


def test_an_oversized_image_is_refused(stream: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    # photo.jpg has 2304 pixels: over twice the limit is Pillow's error, over once only its warning.
    assert [p for p in problems(stream) if "images/photo.jpg is too large" in p]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    assert [p for p in problems(stream) if "images/photo.jpg is too large" in p]


def test_a_picture_that_is_not_used_as_stored_is_a_note_with_file_and_line(stream: Path) -> None:
    frames = [Image.new("RGB", (24, 24), colour) for colour in ("red", "blue")]
    frames[0].save(stream / "captions" / "images" / "moving.gif", save_all=True, append_images=frames[1:])
    rows = [row(0), row(1, image="images/moving.gif"), row(2, image="images/moving.gif")]
    write_jsonl(stream / "captions" / "train.jsonl", rows)
    read = read_stream(stream)
    assert read.notes == ("captions/train.jsonl:2: image images/moving.gif has 2 frames; the first one is used",)
    assert read.image_sizes[stream / "captions" / "images" / "moving.gif"] == (24, 24)
    assert read_stream(stream, check_images=False).notes == ()


@pytest.mark.parametrize(("form", "size"), [("AVIF", 60), ("BLP", 40), ("DDS", 100)])
def test_what_a_foreign_decoder_raises_is_a_finding(stream: Path, form: str, size: int) -> None:
    path = stream / "captions" / "images" / "photo.jpg"
    Image.effect_noise((48, 48), 60).convert("P" if form == "BLP" else "RGB").save(path, form)
    path.write_bytes(path.read_bytes()[:size])
    (found,) = problems(stream)
    assert found.startswith("captions/train.jsonl:3: image images/photo.jpg cannot be decoded (")
    assert found.endswith("; replace the file")
