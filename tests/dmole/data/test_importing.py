# SPDX-License-Identifier: Apache-2.0
"""Published layouts become streams that pass every check; what is left out is counted with its reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dmole.cli import WRONG_INPUT, status
from dmole.data import Sample, Stream, Turn, read_stream
from dmole.data.importing import import_tasks
from dmole.data.layouts import LAYOUTS, PAPER
from dmole.data.layouts.coin import unpadded
from dmole.published import PUBLISHED, layout_findings

from . import layout_samples

VQA = "\nAnswer the question using a single word or phrase."
CAPTION = "Provide a one-sentence caption for the provided image."


def imported(layout: str, tmp_path: Path) -> tuple[Stream, dict[str, dict[str, int]]]:
    """The stream of a layout's sample, and what was left out by split."""
    source, target = tmp_path / "source", tmp_path / "stream"
    getattr(layout_samples, layout)(source)
    (report,) = import_tasks(layout, source, target)
    kept = json.loads((target / layout / "import.json").read_text())
    assert {split: one["rows"] for split, one in kept["splits"].items()} == {
        split: one.rows for split, one in report.splits.items()
    }
    return read_stream(target), {split: dict(one.dropped) for split, one in report.splits.items()}


def sizes(stream: Stream) -> list[int]:
    (task,) = stream.tasks
    return [len(task.train), len(task.validation), len(task.test)]


def test_vizwiz_caption(tmp_path: Path) -> None:
    stream, dropped = imported("vizwiz_caption", tmp_path)
    assert sizes(stream) == [4, 0, 2] and stream.tasks[0].metric == "cider"
    assert dropped["train"] == dropped["test"] == {"picture without a caption": 1}
    assert stream.tasks[0].test[1] == Sample(
        id="test-VizWiz_val_00000001.jpg",
        images=(tmp_path / "source" / "val" / "VizWiz_val_00000001.jpg",),
        instruction=CAPTION,
        answers=("caption 0 of picture 1", "caption 1 of picture 1"),
    )


def test_vizwiz_vqa(tmp_path: Path) -> None:
    stream, dropped = imported("vizwiz_vqa", tmp_path)
    assert sizes(stream) == [2, 0, 2] and stream.tasks[0].metric == "vqa"
    assert dropped["train"] == {"answers has ... entries; expected at least ...": 1}
    sample = stream.tasks[0].train[0]
    assert sample.answers[0] == "the cat" and sorted(sample.answers) == sorted(a["answer"] for a in layout_samples.TEN)
    assert sample.instruction.startswith("What is it?\nWhen the provided information is insufficient, respond with ")


def test_textcaps(tmp_path: Path) -> None:
    stream, dropped = imported("textcaps", tmp_path)
    assert sizes(stream) == [4, 0, 2]
    assert dropped == {"train": {"image ... is missing": 2}, "validation": {}, "test": {"image ... is missing": 1}}
    assert stream.tasks[0].test[0].answers == ("A sign 0 says aa.", "A sign 1 says aa.")


def test_flickr30k(tmp_path: Path) -> None:
    stream, dropped = imported("flickr30k", tmp_path)
    assert sizes(stream) == [10, 1, 2] and not any(dropped.values())
    assert len(stream.tasks[0].test[0].answers) == 5 and len(stream.tasks[0].train[0].answers) == 1


def test_sk_vg(tmp_path: Path) -> None:
    stream, dropped = imported("sk_vg", tmp_path)
    assert sizes(stream) == [2, 1, 1] and stream.tasks[0].metric == "iou"
    assert dropped["train"] == {"picture cannot be opened (FileNotFoundError)": 1}
    sample = stream.tasks[0].test[0]
    # Centre (60, 50), 40 x 50 pixels of 200 x 100.
    assert sample.answers == ("20 25 40 75",)
    assert sample.instruction == (
        "Based on the knowledge Ann wears red.\nPlease provide the bounding box coordinate of the region this sentence "
        "describes: the woman who wears red"
    )


def test_iconqa(tmp_path: Path) -> None:
    stream, dropped = imported("iconqa", tmp_path)
    assert sizes(stream) == [2, 2, 2] and dropped["train"] == {"answer is the place of no choice": 1}
    first = stream.tasks[0].train[0]
    assert (first.id, first.answers, first.options) == ("train-9", ("B",), ("3", "4"))
    assert first.instruction == (
        "How many?\nA. 3\nB. 4\nAnswer with the option's letter from the given choices directly."
    )


def test_ocr_vqa(tmp_path: Path) -> None:
    stream, dropped = imported("ocr_vqa", tmp_path)
    assert sizes(stream) == [3, 2, 2]
    assert dropped["train"] == {"answers[...] is empty; expected some text": 1}
    assert stream.tasks[0].train[0].instruction == "Who wrote this book?" + VQA


def test_kvqa(tmp_path: Path) -> None:
    stream, dropped = imported("kvqa", tmp_path)
    assert sizes(stream) == [4, 2, 2]
    assert dropped["train"] == {"split is [..., ...], which names no part": 1}
    sample = stream.tasks[0].test[1]
    assert sample.answers == ("2",) and sample.entities == ("Ann", "Bob")


def test_pmc_vqa(tmp_path: Path) -> None:
    stream, dropped = imported("pmc_vqa", tmp_path)
    assert sizes(stream) == [2, 0, 1]
    assert dropped["train"] == {
        "answer is not one of the choices": 1,
        "options holds a text twice; expected distinct options": 1,
    }
    assert [sample.answers for sample in stream.tasks[0].train] == [("B",), ("B",)]
    assert stream.tasks[0].test[0].options == ("MRI", "CT", "PET", "X-ray")


def test_the_papers_nine_tasks_are_its_recipes(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "paper"
    for name in PAPER:
        getattr(layout_samples, name)(source / name)
    import_tasks("paper", source, target)
    stream = read_stream(target)
    assert stream.task_names == tuple(PUBLISHED["paper"]) == tuple(PAPER)
    found = layout_findings("paper", stream)
    # The tasks and their metrics are right; of the sizes every one is said.
    assert len(found) == 18 and all("published with" in line and "metric" not in line for line in found)


def test_coin(tmp_path: Path) -> None:
    source, images, target = tmp_path / "Instruction_Type1", tmp_path / "cl_dataset", tmp_path / "coin"
    layout_samples.coin(source, images)
    reports = import_tasks("coin", source, target, images=images)
    stream = read_stream(target)
    assert stream.task_names == tuple(PUBLISHED["coin"]) and layout_findings("coin", stream) == []
    assert stream.task("ScienceQA").train[0].images == ()
    text = stream.task("TextVQA")
    assert text.train[0] == Sample(
        id="train-0",
        images=(images / "COCO2014" / "train2014" / "1.jpg",),
        instruction="What is 0?\nAnswer briefly.",
        answers=("thing 0",),
    )
    assert [sample.id for sample in text.test] == ["test-0", "test-1"]
    assert stream.task("Grounding").train[0].answers == stream.task("Grounding").test[0].answers == ("0 50 50 99",)
    (grounding,) = [report for report in reports if report.name == "Grounding"]
    assert grounding.splits["train"].dropped == {"answer is no box": 1}


@pytest.mark.parametrize(
    ("text", "size", "expected"),
    [
        ("[0.1, 0.2, 0.3, 0.4]", (50, 50), "10 20 30 40"),
        ("[0.0, 0.25, 1.0, 0.75]", (200, 100), "0 0 99 99"),
        ("[0.25, 0, 0.75, 0.5]", (100, 200), "0 0 99 50"),
        ("nothing", (10, 10), None),
    ],
)
def test_a_box_of_the_padded_square(text: str, size: tuple[int, int], expected: str | None) -> None:
    assert unpadded(text, *size) == expected


def test_ucit(tmp_path: Path) -> None:
    source, images, target = tmp_path / "instructions", tmp_path / "datasets", tmp_path / "ucit"
    layout_samples.ucit(source, images)
    reports = import_tasks("ucit", source, target, images=images)
    stream = read_stream(target)
    assert stream.task_names == ("ImageNet-R", "ArxivQA", "VizWiz-Caption", "IconQA", "CLEVR-Math", "Flickr30k")
    captions = stream.task("Flickr30k")
    assert captions.metric == "cider" and [sample.answers for sample in captions.test] == [
        ("0 of 1", "1 of 1"),
        ("0 of 2", "1 of 2"),
    ]
    (report,) = [report for report in reports if report.name == "Flickr30k"]
    assert report.splits["test"].dropped == {"no captions in val_coco_type_....json": 1}


def llava(source: Path) -> None:
    talk = [
        {"from": "human", "value": "What is this?\n<image>"},
        {"from": "gpt", "value": "A square."},
        {"from": "human", "value": "Its colour?"},
        {"from": "gpt", "value": "Blue."},
    ]
    single = [{"from": "human", "value": "<image>\nName it."}, {"from": "gpt", "value": "Square"}]
    for name in ("a.jpg", "b.jpg"):
        layout_samples.picture(source / name)
    records: list[dict[str, Any]] = [
        {"id": "x", "image": "a.jpg", "conversations": talk},
        {"id": "x", "image": "a.jpg", "conversations": single},
        {"images": ["a.jpg", "b.jpg"], "conversations": [{"from": "user", "value": "Same?"}, *single[1:]]},
        {"id": "none", "image": "a.jpg", "conversations": single[:1]},
        {"id": "many", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image><image>?"}, *single[1:]]},
        {"id": "who", "image": "a.jpg", "conversations": [{"from": "robot", "value": "?"}, *single[1:]]},
        {"id": "text", "conversations": [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "It"}]},
    ]
    layout_samples.write_json(source / "train.json", records)
    lines = "".join(json.dumps(record) + "\n" for record in records[:2])
    (source / "test.jsonl").write_text(lines)


def test_llava(tmp_path: Path) -> None:
    llava(tmp_path)
    (report,) = import_tasks("llava", tmp_path, tmp_path / "out", name="talks", metric="cider")
    stream = read_stream(tmp_path / "out")
    task = stream.task("talks")
    assert task.metric == "cider" and [sample.id for sample in task.train] == [
        "train-x", "train-x-2", "train-train.json[2]", "train-text",
    ]  # fmt: skip
    talk, single, pair, text = task.train
    assert (
        talk.taught == "all"
        and talk.answers == ("Blue.",)
        and talk.turns
        == (
            Turn(role="user", parts=("What is this?", None)),
            Turn(role="assistant", parts=("A square.",)),
            Turn(role="user", parts=("Its colour?",)),
        )
    )
    assert (single.instruction, single.turns, single.images) == ("Name it.", (), (tmp_path / "a.jpg",))
    assert (pair.instruction, len(pair.images), text.images) == ("Same?", 2, ())
    assert report.splits["train"].dropped == {
        "the last turn is not an answer": 1,
        "<image> stands ... times beside ... images": 1,
        "a turn from ...": 1,
    }
    lines = report.lines()
    assert lines[0] == "talks: cider, 4 train, 0 validation, 2 test"
    assert "  train: left out 1: a turn from ... (such as train.json[5]: a turn from 'robot')" in lines
    assert yaml.safe_load((tmp_path / "out" / "talks" / "task.yaml").read_text()) == {
        "name": "talks", "metric": "cider", "taught": "all",
    }  # fmt: skip


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llava(tmp_path)
    command = ["tasks", "import", "llava", str(tmp_path), str(tmp_path / "out")]
    assert status([*command, "--name", "a"]) == 0 and status([*command, "--name", "b", "--metric", "cider"]) == 0
    said = capsys.readouterr().out
    assert "a: exact_match, 4 train, 0 validation, 2 test" in said and "left out 1: " in said
    assert status(["tasks", "check", str(tmp_path / "out")]) == 0
    assert read_stream(tmp_path / "out").task_names == ("a", "b")
    assert status([*command, "--name", "a"]) == WRONG_INPUT
    assert "got a task that is there already" in capsys.readouterr().err


Spoil = Callable[[Path], Any]
WRONG: dict[str, tuple[Spoil, dict[str, Any], str]] = {
    "layout": (lambda root: None, {"layout": "lava"}, "layout: got 'lava'; expected one of llava, vizwiz_caption, "),
    "metric": (lambda root: None, {"metric": "blue"}, "metric: got 'blue'; expected one of "),
    "name of many": (
        lambda root: None,
        {"layout": "coin", "name": "x"},
        "name and metric: got them for coin, which has 8 tasks; expected none. Drop them.",
    ),
    "no folder": (
        lambda root: None,
        {"source": Path("/no/such")},
        "source: got /no/such, which is no folder; expected one with train.json, test.json, the images. Check it.",
    ),
    "no file": (
        lambda root: (root / "test.jsonl").unlink(),
        {},
        "got no test.json or test.jsonl; expected train.json, test.json, the images. Check the folder, or fetch",
    ),
    "no json": (lambda root: (root / "train.json").write_text("{"), {}, "train.json: got no JSON ("),
    "no json line": (
        lambda root: (root / "test.jsonl").write_text("{}\n{"),
        {},
        "test.jsonl:2: got no JSON (",
    ),
    "another layout": (
        lambda root: layout_samples.write_json(root / "dataset.json", {"a": {"split": 1}}),
        {"layout": "ocr_vqa"},
        "got a record that lacks 'imageURL'; expected those of dataset.json, images/. Check the layout's",
    ),
    "records of another form": (
        lambda root: (root / "train.json").write_text("[3]"),
        {},
        "got a record that is of another form (",
    ),
    "nothing left": (
        lambda root: (root / "train.json").write_text('[{"image": "a.jpg"}]'),
        {},
        "got no train row for the task llava; expected some in train.json, test.json, the images.\n",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_imported_leaves_nothing_behind(tmp_path: Path, case: str) -> None:
    spoil, options, expected = WRONG[case]
    llava(tmp_path)
    spoil(tmp_path)
    given = {"layout": "llava", "source": tmp_path, **options}
    with pytest.raises(ValueError) as caught:
        import_tasks(given.pop("layout"), given.pop("source"), tmp_path / "out", **given)
    assert expected in str(caught.value)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_every_layout_is_in_one_file() -> None:
    assert set(LAYOUTS) == {"llava", "paper", "coin", "ucit", *PAPER}
