# SPDX-License-Identifier: Apache-2.0
"""Pretraining scenes: the same on every machine, of entities that no task uses; a small run learns and is saved."""

import random
from pathlib import Path

import pytest

from mini_cmit.model.base import load_base
from mini_cmit.pretraining.corpus import read_shard, write_corpus
from mini_cmit.pretraining.curriculum import CURRICULUM
from mini_cmit.pretraining.posters import place_names
from mini_cmit.pretraining.scene import SIDE, box_text
from mini_cmit.pretraining.shapes import odd_one_scene, shapes_scene
from mini_cmit.pretraining.train import PretrainingSettings, pretrain
from mini_cmit.tasks.countries import countries
from mini_cmit.tasks.films import films_in_pool


@pytest.mark.parametrize("family", CURRICULUM)
def test_a_scene_is_decided_by_its_seed(family: str) -> None:
    make, count = CURRICULUM[family]
    first, second = make(random.Random(f"{family}/7")), make(random.Random(f"{family}/7"))
    assert first.image.tobytes() == second.image.tobytes() and first.turns == second.turns
    assert first.image.size == (SIDE, SIDE) and count >= 2000
    assert 2 <= len(first.turns) <= 6 and all(turn.question and turn.answer for turn in first.turns)


@pytest.mark.parametrize("family", CURRICULUM)
def test_no_task_s_country_title_or_question_is_taught(family: str) -> None:
    make, _ = CURRICULUM[family]
    asked = {country.name for country in countries("test")} | {country.capital for country in countries("test")}
    # A title of one word is an everyday word too; of longer ones none may be an answer.
    films = [film.title for pool in ("train", "validation", "test") for film in films_in_pool(pool)]
    titles = {title for title in films if " " in title}
    for index in range(40):
        for turn in make(random.Random(f"{family}/{index}")).turns:
            assert turn.answer not in asked | titles
            assert turn.question not in (
                "Which country is shown? Answer briefly.",
                "Describe the image in one sentence.",
            )


def test_place_names_leave_out_the_asked_capitals() -> None:
    assert len(place_names()) > 300
    assert {name.lower() for name in place_names()}.isdisjoint(c.capital.lower() for c in countries("test"))


def test_boxes_are_hundredths_of_the_side() -> None:
    assert box_text(0, 16, 80, 160) == "0 10 50 99"


def test_a_shard_does_not_depend_on_the_workers_and_a_damaged_one_is_made_again(tmp_path: Path) -> None:
    count = 40  # one worker's parts of 10 and three workers' parts of 3 or 4 images
    for name, workers in (("one", 1), ("three", 3)):
        write_corpus(tmp_path / name, {"shapes": (shapes_scene, count)}, workers=workers)
    names = {"shapes.npy", "shapes.jsonl", "shapes.json"}
    made = {name: (tmp_path / "one" / name).read_bytes() for name in names}
    assert {path.name: path.read_bytes() for path in (tmp_path / "three").iterdir()} == made
    features = tmp_path / "one" / "shapes.npy"
    moment = features.stat().st_mtime_ns
    write_corpus(tmp_path / "one", {"shapes": (shapes_scene, count)}, workers=1)
    assert features.stat().st_mtime_ns == moment
    for name, damaged in (("shapes.npy", made["shapes.npy"][:-2] + b"\x00\x3c"), ("shapes.json", b"{")):
        (tmp_path / "one" / name).write_bytes(damaged)
        write_corpus(tmp_path / "one", {"shapes": (shapes_scene, count)}, workers=2)
        assert {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()} == made
    # Another scene under the name of this one.
    write_corpus(tmp_path / "one", {"shapes": (odd_one_scene, count)}, workers=2)
    assert (tmp_path / "one" / "shapes.npy").read_bytes() != made["shapes.npy"]


def test_a_small_run_is_written_and_loads(tmp_path: Path) -> None:
    families = {"shapes": (shapes_scene, 24), "odd_one": (odd_one_scene, 24)}
    write_corpus(tmp_path / "corpus", families, workers=1)
    shard = read_shard(tmp_path / "corpus", "shapes")
    assert shard.features.shape == (24, 2368, 5, 5) and shard.turns[3] == shapes_scene(random.Random("shapes/3")).turns
    settings = PretrainingSettings(epochs=1, batch_size=8, vision_batch_size=8, held_out=4, vocabulary=300)
    pretrain(tmp_path / "corpus", list(families), settings, tmp_path / "model", processes=1)
    assert "phase,step,images" in (tmp_path / "model" / "pretraining.csv").read_text()
    model = load_base(tmp_path / "model")
    assert model.model.config._attn_implementation == "eager"
    assert model.image_tokens == 25 and sum(p.numel() for p in model.model.parameters()) > 6e6
