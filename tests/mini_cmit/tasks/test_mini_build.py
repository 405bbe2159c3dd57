# SPDX-License-Identifier: Apache-2.0
"""The nine tasks as files: the same bytes twice, readable, and nothing crosses a split or comes from pretraining."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import typer

from dmole.data.reading import read_stream
from mini_cmit.stream import mini_stream
from mini_cmit.tasks import build, films
from mini_cmit.tasks.__main__ import WRONG_INPUT, main
from mini_cmit.tasks.build import MANIFEST, TASKS, build_mini, task_rows
from mini_cmit.tasks.building import PRETRAINING, SPLITS, BuildContext, pool_of
from mini_cmit.tasks.contact_sheet import contact_sheet, write_contact_sheets
from mini_cmit.tasks.icons import drawings_in_pool

SIZES = {"image_side": 96, "train": 24, "validation": 8, "test": 12}


@pytest.fixture(scope="module")
def stream_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_mini(tmp_path_factory.mktemp("built") / "mini", workers=1, **SIZES)


def rows_of(folder: Path, task: str, split: str) -> list[dict[str, Any]]:
    text = (folder / task / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def bytes_of(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_two_builds_have_the_same_bytes_whatever_the_number_of_workers(stream_folder: Path, tmp_path: Path) -> None:
    again = build_mini(tmp_path / "again", workers=2, **SIZES)
    assert bytes_of(again) == bytes_of(stream_folder)


def test_a_small_build_is_the_beginning_of_a_larger_one(stream_folder: Path, tmp_path: Path) -> None:
    context = BuildContext(root=tmp_path, seed=0, image_side=SIZES["image_side"], train=5, validation=2, test=3)
    for task in TASKS:
        small = task_rows(task, context)
        for split in SPLITS:
            built = [json.loads(json.dumps(row.as_json())) for row in small.split(split)]
            assert built == rows_of(stream_folder, task, split)[: len(built)]
            for row in built:
                ours, theirs = tmp_path / task / row["image"], stream_folder / task / row["image"]
                assert ours.read_bytes() == theirs.read_bytes()


def test_another_seed_gives_other_samples(tmp_path: Path) -> None:
    rows = []
    for seed in (0, 1):
        context = BuildContext(root=tmp_path / str(seed), seed=seed, image_side=96, train=4, validation=1, test=1)
        rows.append(task_rows("number_reading", context).train)
    assert rows[0] != rows[1]


def test_the_stream_is_read_without_a_finding(stream_folder: Path) -> None:
    stream = read_stream(stream_folder)
    assert stream.name == "mini"
    assert tuple(task.name for task in stream.tasks) == TASKS
    for task in stream.tasks:
        assert (len(task.train), len(task.validation), len(task.test)) == (24, 8, 12)


@pytest.mark.parametrize("task", TASKS)
def test_no_entity_and_no_image_crosses_a_split(task: str, stream_folder: Path) -> None:
    entities: dict[str, str] = {}
    images: dict[str, str] = {}
    for split in SPLITS:
        for row in rows_of(stream_folder, task, split):
            assert row["entities"], f"{row['id']} says nothing of what it shows"
            for entity in row["entities"]:
                assert entities.setdefault(entity, split) == split
            digest = hashlib.sha256((stream_folder / task / row["image"]).read_bytes()).hexdigest()
            assert images.setdefault(digest, split) == split


@pytest.mark.parametrize("task", TASKS)
def test_nothing_comes_from_the_pretraining_pool(task: str, stream_folder: Path) -> None:
    pretraining_icons = set(drawings_in_pool(PRETRAINING))
    for split in SPLITS:
        for row in rows_of(stream_folder, task, split):
            for entity in row["entities"]:
                if entity.startswith(("lucide/", "bootstrap/")):
                    # Two names of one drawing share a pool, which is that of the first name.
                    assert entity in drawings_in_pool(split) and entity not in pretraining_icons
                else:
                    assert pool_of(entity) == split


def test_no_rendered_title_crosses_a_split(stream_folder: Path) -> None:
    titles = {
        split: {answer for row in rows_of(stream_folder, "poster_captions", split) for answer in titles_in(row)}
        for split in SPLITS
    }
    pretraining = {film.title for film in films.films_in_pool(PRETRAINING)}
    assert all(titles.values())
    assert not titles["train"] & titles["test"] and not titles["train"] & titles["validation"]
    assert not titles["validation"] & titles["test"]
    assert not set.union(*titles.values()) & pretraining


def titles_in(row: dict[str, Any]) -> set[str]:
    return {entity.removeprefix("film/") for entity in row["entities"]}


@pytest.mark.parametrize("task", TASKS)
def test_the_form_of_instruction_and_answer(task: str, stream_folder: Path) -> None:
    for row in rows_of(stream_folder, task, "test"):
        instruction, answer = row["instruction"], row["answers"][0]
        if row.get("options"):
            assert instruction.endswith("\nAnswer with the letter.")
            assert "ABCDEFGH".index(answer) < len(row["options"])
        elif "x1 y1 x2 y2" in instruction:
            left, top, right, bottom = map(int, answer.split())
            assert 0 <= left < right <= 99 and 0 <= top < bottom <= 99
        else:
            assert instruction == "Describe the image in one sentence." or instruction.endswith(" Answer briefly.")


def test_a_matching_build_is_reused_and_a_damaged_one_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "TASKS", ("number_reading",))
    sizes = {"image_side": 64, "train": 2, "validation": 1, "test": 2}
    folder = build.build_mini(tmp_path / "mini", workers=1, **sizes)
    first = (folder / MANIFEST).stat().st_mtime_ns
    assert build.build_mini(folder, workers=1, **sizes) == folder
    assert (folder / MANIFEST).stat().st_mtime_ns == first
    expected = bytes_of(folder)
    image = next((folder / "number_reading" / "images").iterdir())

    def cut(file: Path) -> None:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    def edit(file: Path) -> None:
        data = file.read_bytes()
        file.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])

    for damage, file in (
        (Path.unlink, image),
        (edit, image),
        (cut, folder / "number_reading" / "test.jsonl"),
        (edit, folder / "stream.yaml"),
        (cut, folder / MANIFEST),
    ):
        damage(file)
        build.build_mini(folder, workers=1, **sizes)
        assert bytes_of(folder) == expected
    build.build_mini(folder, workers=1, **{**sizes, "train": 3})
    assert len(rows_of(folder, "number_reading", "train")) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mini"], "a build leaves nothing beside the folder"


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("ten years")
    with pytest.raises(ValueError, match=r"has no manifest\.json, so it was not built here; .* Name another folder\."):
        build_mini(tmp_path, **SIZES)
    assert (tmp_path / "thesis.tex").read_text() == "ten years"


@pytest.mark.parametrize(("name", "value"), [("train", 1), ("test", 0), ("validation", 0), ("image_side", 32)])
def test_sizes_that_make_no_stream_are_errors(name: str, value: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is {value}; expected at least"):
        build_mini(tmp_path / "mini", **{**SIZES, name: value})


def test_the_command_builds_or_finds_and_says_where(
    stream_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = bytes_of(stream_folder)
    main(output=stream_folder, sheets=tmp_path / "sheets", **SIZES)
    first, *sheets = capsys.readouterr().out.splitlines()
    assert first == str(stream_folder) and bytes_of(stream_folder) == before
    assert sheets == [str(tmp_path / "sheets" / f"{task}.png") for task in sorted(TASKS)]
    with pytest.raises(typer.Exit) as stopped:
        main(output=tmp_path / "none", **{**SIZES, "train": 1})
    assert stopped.value.exit_code == WRONG_INPUT
    assert capsys.readouterr().err == "error: train is 1; expected at least 2. Leave it out for the default.\n"


def test_the_registered_stream_is_built_once_into_the_cache_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DMOLE_CACHE", str(tmp_path))
    # The real builder at another size: the default takes a minute.
    sizes = {"image_side": 64, "train": 2, "validation": 1, "test": 2}
    monkeypatch.setattr(build, "build_mini", functools.partial(build_mini, workers=1, **sizes))
    said: list[str] = []
    folder = mini_stream(said.append)
    assert folder == tmp_path / "mini" and read_stream(folder).task_names == TASKS
    assert said == [f"building the mini benchmark in {folder} (once)"]
    built = bytes_of(folder)
    assert mini_stream(said.append) == folder and len(said) == 1 and bytes_of(folder) == built


def test_an_unknown_task_is_an_error(tmp_path: Path) -> None:
    context = BuildContext(root=tmp_path, seed=0, image_side=96, train=2, validation=1, test=1)
    with pytest.raises(ValueError, match="task is 'icons'; expected one of icon_captions, map_grounding"):
        task_rows("icons", context)


def test_contact_sheets_show_every_task(stream_folder: Path, tmp_path: Path) -> None:
    written = write_contact_sheets(stream_folder, tmp_path)
    assert [file.stem for file in written] == sorted(TASKS)
    assert contact_sheet(stream_folder, "molecules").width == 1200
    with pytest.raises(ValueError, match=r"there is no train\.jsonl of task 'maps'"):
        contact_sheet(stream_folder, "maps")
