# SPDX-License-Identifier: Apache-2.0
"""Rows of transformers and TRL: what they become, and what is refused by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dmole.data import DataError, Sample, Turn, read_stream
from dmole.data.collate import IGNORE, collate
from dmole.models.vision_language import VisionLanguageModel

PLAIN = {"id": "p", "image": "a.png", "instruction": "What is it?", "answers": ["a square"]}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def assistant(value: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [text(value)]}


def written(folder: Path, rows: list[dict[str, Any]], *, taught: str = "") -> Path:
    """A stream of one task whose training rows are `rows`."""
    (folder / "t").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png")):
        Image.new("RGB", (16, 16), (200 * number, 40, 40)).save(folder / "t" / name)
    (folder / "stream.yaml").write_text(
        f"name: s\ntasks:\n  - {{name: t, metric: exact_match, directory: t{taught and ', taught: ' + taught}}}\n"
    )
    lines = "".join(json.dumps(row) + "\n" for row in (PLAIN, *rows))
    (folder / "t" / "train.jsonl").write_text(lines)
    (folder / "t" / "test.jsonl").write_text(json.dumps({**PLAIN, "id": "q"}) + "\n")
    return folder


def read(folder: Path, row: dict[str, Any], **options: str) -> Sample:
    return read_stream(written(folder, [row], **options)).tasks[0].train[1]


def finding(folder: Path, row: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        read_stream(written(folder, [row]))
    assert len(caught.value.problems) == 1, caught.value.problems
    place, _, what = caught.value.problems[0].partition(": ")
    assert place == "t/train.jsonl:2"
    return what


IMAGE = {"type": "image"}
AS_PLAIN: dict[str, dict[str, Any]] = {
    "text content": {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "No."}]},
    "parts": {"messages": [user(text("Why?")), assistant("No.")]},
    "prompt and completion": {"prompt": "Why?", "completion": "No."},
    "prompt as messages": {"prompt": [user(text("Why?"))], "completion": [assistant("No.")]},
}


@pytest.mark.parametrize("form", AS_PLAIN)
@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_a_single_question_is_a_plain_sample(tmp_path: Path, form: str, pictures: int) -> None:
    names = ["a.png", "b.png"][:pictures]
    found = read(tmp_path, {**AS_PLAIN[form], "images": names})
    assert found == Sample(
        id="train-2",
        images=tuple(tmp_path / "t" / name for name in names),
        instruction="Why?",
        answers=("No.",),
    )


@pytest.mark.parametrize("key", ["path", "image", "url"])
def test_an_image_part_may_name_its_file(tmp_path: Path, key: str) -> None:
    row = {"messages": [user({"type": "image", key: "b.png"}, text("Why?")), assistant("No.")]}
    found = read(tmp_path, row)
    assert found.images == (tmp_path / "t" / "b.png",) and found.turns == ()


def test_several_turns_keep_their_images_in_place(tmp_path: Path) -> None:
    row = {
        "id": "talk",
        "images": ["a.png"],
        "messages": [
            {"role": "system", "content": "Be brief."},
            user(text("First this"), IMAGE, text("then?")),
            assistant("Red."),
            user({"type": "image", "path": "b.png"}, text("And this?")),
            assistant("Black."),
        ],
        "answers": ["Black.", "dark"],
        "entities": ["e"],
    }
    found = read(tmp_path, row)
    assert found == Sample(
        id="talk",
        images=(tmp_path / "t" / "a.png", tmp_path / "t" / "b.png"),
        instruction="And this?",
        answers=("Black.", "dark"),
        entities=("e",),
        turns=(
            Turn(role="system", parts=("Be brief.",)),
            Turn(role="user", parts=("First this", None, "then?")),
            Turn(role="assistant", parts=("Red.",)),
            Turn(role="user", parts=(None, "And this?")),
        ),
    )


def test_a_test_row_may_have_its_answers_apart(tmp_path: Path) -> None:
    assert read(tmp_path, {"messages": [user(text("Why?"))], "answers": ["No.", "Never."]}).answers == ("No.", "Never.")


QUESTION = user(text("Why?"))
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "url in images": (
        {"prompt": "Why?", "completion": "No.", "images": ["https://example.org/a.png"]},
        "images is a https: address; expected the path of a file. Save the picture as a file",
    ),
    "url in a part": (
        {"messages": [user({"type": "image", "url": "http://x/a.png"}, text("Why?")), assistant("No.")]},
        "images is a http: address; expected the path of a file. Save the picture as a file",
    ),
    "data uri": (
        {"prompt": "Why?", "completion": "No.", "images": ["data:image/png;base64,AAAA"]},
        "images is a data URI; expected the path of a file. Save the picture as a file",
    ),
    "base64": (
        {"messages": [user({"type": "image", "base64": "AAAA"}, text("Why?")), assistant("No.")]},
        "messages[0].content[0] is of the kind 'base64'; expected a text, or an image by its path. Write pictures to "
        "files",
    ),
    "image_url": (
        {"messages": [user({"type": "image_url", "image_url": {"url": "x"}}, text("Why?")), assistant("No.")]},
        "messages[0].content[0] is of the kind 'image_url'; expected a text, or an image by its path. Write pictures "
        "to files",
    ),
    "video": (
        {"messages": [user({"type": "video", "path": "a.mp4"}, text("Why?")), assistant("No.")]},
        "messages[0].content[0] is of the kind 'video'; expected a text, or an image by its path. Write pictures to "
        "files",
    ),
    "unknown type": (
        {"messages": [user({"type": "smell"}, text("Why?")), assistant("No.")]},
        "messages[0].content[0] has type the string 'smell'; expected a text, or an image by its path. Write pictures "
        "to files",
    ),
    "too few images": (
        {"messages": [user(IMAGE, IMAGE, text("Why?")), assistant("No.")], "images": ["a.png"]},
        "has 2 image parts without a path and 1 images; expected as many of each",
    ),
    "no answer": ({"messages": [QUESTION]}, "has no answer; expected the assistant's message at the end, or answers"),
    "no messages": (
        {"messages": "hi"},
        "messages is the string 'hi'; expected a list of messages with role and content",
    ),
    "two questions": (
        {"messages": [QUESTION, QUESTION, assistant("No.")]},
        "roles are user, user, assistant; expected user and assistant in turns, after at most one system message, "
        "with the answer last",
    ),
    "a tool": (
        {"messages": [QUESTION, {"role": "tool", "content": "x"}, assistant("No.")]},
        "messages[1].role is the string 'tool'; expected system, user, assistant",
    ),
    "an image of the assistant": (
        {"messages": [QUESTION, {"role": "assistant", "content": [IMAGE, text("No.")]}], "images": ["a.png"]},
        "messages[1] shows an image as assistant; expected images in the user's messages",
    ),
    "empty question": (
        {"messages": [user(text(" ")), assistant("No.")]},
        "messages[0].content has no text; expected some",
    ),
    "content a number": (
        {"messages": [{"role": "user", "content": 3}, assistant("No.")]},
        "messages[0].content is the number 3; expected a text or a list of parts",
    ),
    "other answers": (
        {"messages": [QUESTION, assistant("No.")], "answers": ["Yes."]},
        "answers[0] is not the assistant's last message; expected that text first",
    ),
    "prompt alone": ({"prompt": "Why?"}, "key 'completion' is missing; expected prompt and completion"),
    "unknown key": (
        {"messages": [QUESTION, assistant("No.")], "image_path": "a.png"},
        "unknown key 'image_path'; expected messages, id, image, images, answers, options, entities "
        "(did you mean 'image'?)",
    ),
    "conversations": (
        {"id": "x", "images": [], "conversations": [], "instruction": "i", "answers": ["a"]},
        "key 'conversations' is LLaVA's and ShareGPT's; make rows of the file with dmole tasks import",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_row_cannot_mean_is_refused_by_line(tmp_path: Path, case: str) -> None:
    row, expected = REFUSED[case]
    assert finding(tmp_path, row) == expected


def labelled(vlm: VisionLanguageModel, sample: Sample) -> str:
    batch = collate(vlm, [sample], with_answers=True)
    kept = batch.labels[0][batch.labels[0] != IGNORE].tolist()
    return str(vlm.tokenizer.decode(kept, skip_special_tokens=True)).replace(" ", "")


@pytest.mark.parametrize(("taught", "trained"), [("", "green"), ("last", "green"), ("all", "redgreen")])
def test_the_last_answer_is_trained_or_all(
    tmp_path: Path, tiny_model: VisionLanguageModel, taught: str, trained: str
) -> None:
    row = {
        "images": ["a.png"],
        "messages": [user(IMAGE, text("which?")), assistant("red"), user(text("and?")), assistant("green")],
    }
    sample = read(tmp_path, row, taught=taught)
    assert labelled(tiny_model, sample) == trained
    assert labelled(tiny_model, read_stream(tmp_path).tasks[0].train[0]) == "asquare"


def test_taught_is_one_of_two_words(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="stream.yaml:3: taught is 'first'; expected last .* or all"):
        read_stream(written(tmp_path, [], taught="first"))
