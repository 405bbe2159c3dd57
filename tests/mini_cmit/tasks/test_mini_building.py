# SPDX-License-Identifier: Apache-2.0
"""The material of the mini benchmark: pools, phrases of icons, titles of films, digits, and the shared wording."""

import random
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from mini_cmit.tasks import icon_captions, icon_questions, molecules, number_reading, poster_captions
from mini_cmit.tasks.building import (
    POOL_SHARES,
    SPLITS,
    BuildContext,
    box_question,
    contrasting_pair,
    lightness,
    multiple_choice,
    part_of,
    pool_of,
    short_answer,
    textured_canvas,
)
from mini_cmit.tasks.digits import digit_images
from mini_cmit.tasks.films import MAX_LETTERS, WORDS, films_in_pool
from mini_cmit.tasks.icons import (
    MIN_ICONS,
    Icon,
    all_icons,
    drawings_in_pool,
    icon_image,
    meaning_of,
    with_article,
)

POOLS = tuple(pool for pool, _ in POOL_SHARES)
OWN_TASKS = (icon_captions, icon_questions, poster_captions, number_reading)


def context_at(root: Path) -> BuildContext:
    return BuildContext(root=root, seed=0, image_side=96, train=3, validation=2, test=2)


def test_pools_have_their_shares_and_never_move() -> None:
    counts = Counter(pool_of(f"entity/{number}") for number in range(20_000))
    assert {pool: round(100 * counts[pool] / 20_000) for pool in POOLS} == dict(POOL_SHARES)
    # Pinned: were the hash to change, entities that a shipped base model was pretrained on would enter the tasks.
    pools = [pool_of(f"digit/{number:04d}") for number in (0, 1, 5, 7)]
    assert pools == ["train", "pretraining", "train", "test"]


def test_parts_are_even_and_independent_of_pools() -> None:
    counts = Counter((pool_of(f"e/{n}") == "train", part_of(f"e/{n}", "two tasks", 2)) for n in range(20_000))
    assert abs(counts[True, 0] - counts[True, 1]) < 400
    assert abs(counts[False, 0] - counts[False, 1]) < 500


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("cloud-rain-fill", "solid cloud with rain"),
        ("cloud-rain-wind", "cloud with rain"),
        ("file-earmark-x", "file with a cross"),
        ("circle-arrow-up", "circle with an up arrow"),
        ("arrow-up-circle-fill", "solid circle with an up arrow"),
        ("bell-slash", "crossed out bell"),
        ("house-slash-fill", "solid crossed out house"),
        ("message-square-text", "speech bubble with lines of text"),
        ("chevron-left", "arrow pointing left"),
        ("arrow-down", "arrow pointing down"),
        ("anchor", None),
        ("cloudy", None),
    ],
)
def test_icon_names_become_phrases(name: str, phrase: str | None) -> None:
    kept = {icon.name.split("/")[1]: icon.phrase for icon in all_icons()}
    assert kept.get(name) == phrase


def test_a_name_is_read_whole_or_not_at_all() -> None:
    assert meaning_of("cloud-rain-sideways") is None
    assert meaning_of("cloudy") is None
    assert with_article("open envelope") == "an open envelope"
    assert with_article("box") == "a box"


def test_every_word_of_a_caption_recurs_on_other_icons() -> None:
    words = Counter(word for icon in all_icons() for word in (icon.noun, icon.addition) if word)
    assert min(words.values()) >= MIN_ICONS
    # What has to be described in the other splits can be learnt in training.
    learnt = Counter(
        word for icons in icon_captions._icons("train").values() for icon in icons for word in words_of(icon)
    )
    for pool in ("validation", "test"):
        for icons in icon_captions._icons(pool).values():
            for icon in icons:
                assert all(learnt[word] >= 3 for word in words_of(icon)), icon.name


def words_of(icon: Icon) -> set[str]:
    return {word for word in (icon.noun, icon.addition) if word}


@pytest.mark.parametrize("pool", POOLS)
def test_the_two_icon_tasks_share_no_icon(pool: str) -> None:
    captions = {icon.name for icons in icon_captions._icons(pool).values() for icon in icons}
    questions = set(icon_questions._drawings(pool))
    assert captions and questions and not captions & questions


@pytest.mark.parametrize("task", [icon_questions, molecules])
def test_letters_are_even_and_an_option_keeps_its_letter(task: ModuleType) -> None:
    rng = random.Random(0)
    rows = [task.draw(rng, "train", 64) for _ in range(400)]
    letters = Counter(row.answers[0] for row in rows)
    assert sorted(letters) == ["A", "B", "C", "D"] and max(letters.values()) < 150
    orders: dict[str, set[tuple[str, ...]]] = {}
    for row in rows:
        orders.setdefault(row.instruction.split("\n")[0], set()).add(row.options)
    assert len(orders) == 3 and all(len(found) == 1 for found in orders.values())


def test_equal_drawings_are_in_one_pool() -> None:
    pools: dict[bytes, set[str]] = {}
    for pool in POOLS:
        for name in drawings_in_pool(pool):
            pools.setdefault(icon_image(name, 48, "black").tobytes(), set()).add(pool)
    crossing = [found for found in pools.values() if len(found) > 1]
    assert not crossing


def test_icon_image_has_size_and_colour() -> None:
    layer = icon_image("lucide/heart", 40, "red")
    assert layer.size == (40, 40) and layer.mode == "RGBA"
    pixels = np.asarray(layer)
    assert pixels[..., 3].max() == 255
    assert set(map(tuple, pixels[..., :3].reshape(-1, 3).tolist())) == {(0xD6, 0x20, 0x20)}


def test_an_unknown_icon_is_an_error_that_says_what_a_name_is() -> None:
    with pytest.raises(ValueError, match=r"icon name is 'heart'; expected one of Icon\.name, such as 'lucide/cloud"):
        icon_image("heart", 40, "red")


def test_digits_are_all_there_once_and_no_image_is_in_two_pools() -> None:
    inks = {pool: {digit.ink.tobytes() for digit in digit_images(pool)} for pool in POOLS}
    assert sum(map(len, inks.values())) == 1797
    assert len(set.union(*inks.values())) == 1797
    for pool in POOLS:
        assert {digit.value for digit in digit_images(pool)} == set(range(10))


def test_film_titles_are_short_and_train_has_every_word() -> None:
    titles: set[str] = set()
    for pool in POOLS:
        films = films_in_pool(pool)
        words = {film.word for film in films}
        assert words == set(WORDS) if pool in ("train", "pretraining") else len(words) > 15
        for film in films:
            assert " ".join(part for part in (film.before, film.word, film.after) if part) == film.title
            assert max(map(len, film.title.split())) <= MAX_LETTERS
            assert film.title not in titles
            titles.add(film.title)


def test_the_wording_of_each_output_form() -> None:
    assert (
        multiple_choice("What is it?", ["a cat", "a dog"]) == "What is it?\nA. a cat\nB. a dog\nAnswer with the letter."
    )
    assert short_answer("Which digits?") == "Which digits? Answer briefly."
    assert box_question("Ohio") == "Give the box of Ohio as x1 y1 x2 y2."


def test_colours_contrast() -> None:
    rng = random.Random(0)
    for _ in range(200):
        ink, background = contrasting_pair(rng, gap=0.5)
        assert abs(lightness(ink) - lightness(background)) >= 0.5


def test_a_background_keeps_its_colour() -> None:
    mean = np.asarray(textured_canvas(random.Random(1), 64, "blue"), dtype=float).mean(axis=(0, 1))
    assert np.abs(mean - (0x1F, 0x4F, 0xD8)).max() < 3


@pytest.mark.parametrize("task", OWN_TASKS, ids=lambda task: task.NAME)
@pytest.mark.parametrize("pool", POOLS)
def test_samples_can_be_drawn_of_every_pool_at_any_size(task: ModuleType, pool: str) -> None:
    for side in (64, 160):
        drawn = task.draw(random.Random(5), pool, side)
        assert drawn.image.size == (side, side)
        assert drawn.entities and all(answer.strip() for answer in drawn.answers)
        # There is something to see: the image is not one colour with a gradient.
        assert np.asarray(drawn.image.convert("L"), dtype=float).std() > 8


def test_captions_of_one_icon() -> None:
    icon = next(icon for icon in all_icons() if icon.name == "bootstrap/cloud-rain-fill")
    assert icon_captions.captions(icon, "red", "white") == (
        "a solid red cloud with rain on a white background",
        "an icon of a solid red cloud with rain on white",
        "on a white background there is a solid red cloud with rain",
        "a solid cloud with rain drawn in red on a white background",
        "solid red cloud with rain, white background",
    )


def test_an_image_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"image of t train 0 has size \(10, 10\); expected a square of side 96"):
        context_at(tmp_path).row("t", "train", 0, Image.new("RGB", (10, 10)), instruction="?", answers=["a"])


@pytest.mark.parametrize("split", SPLITS)
def test_a_sample_does_not_depend_on_how_many_there_are(split: str, tmp_path: Path) -> None:
    context = context_at(tmp_path)
    assert context.rng("t", split, 2).random() == context_at(tmp_path / "other").rng("t", split, 2).random()
    assert context.rng("t", split, 2).random() != context.rng("t", split, 1).random()
