# SPDX-License-Identifier: Apache-2.0
"""Maps, charts, countries and molecules: what is said of an image is true, and nothing crosses a pool."""

import math
import random
from collections import Counter
from types import ModuleType

import numpy as np
import pytest

from mini_cmit.tasks import (
    chart_captions,
    chart_questions,
    country_knowledge,
    map_grounding,
    molecules,
)
from mini_cmit.tasks.building import POOL_SHARES, SPLITS, Drawn, rgb
from mini_cmit.tasks.charts import SIDES, TRENDS, Trend, curve_with, highest_side, resampled, series, trend_of
from mini_cmit.tasks.compounds import ELEMENTS, GROUPS, compounds
from mini_cmit.tasks.countries import TASK_COUNTRIES, countries
from mini_cmit.tasks.outlines import outline, project, ring_area
from mini_cmit.tasks.regions import place, regions
from mini_cmit.tasks.sources import package_file, plain, slug

POOLS = tuple(pool for pool, _ in POOL_SHARES)
OWN_TASKS = (map_grounding, chart_captions, chart_questions, country_knowledge, molecules)
SIDE = 96


def samples(task: ModuleType, pool: str, count: int) -> list[Drawn]:
    return [task.draw(random.Random(f"{task.NAME} {pool} {index}"), pool, SIDE) for index in range(count)]


@pytest.mark.parametrize("task", OWN_TASKS, ids=lambda task: task.NAME)
@pytest.mark.parametrize("pool", POOLS)
def test_every_task_draws_from_every_pool_the_same_twice(task: ModuleType, pool: str) -> None:
    for first, second in zip(samples(task, pool, 3), samples(task, pool, 3), strict=True):
        assert first.image.size == (SIDE, SIDE)
        assert first.image.tobytes() == second.image.tobytes()
        assert (first.instruction, first.answers, first.entities) == (
            second.instruction,
            second.answers,
            second.entities,
        )


@pytest.mark.parametrize("material", [regions, series, compounds], ids=lambda material: material.__name__)
def test_no_entity_is_in_two_pools(material) -> None:
    entities = {pool: {one.entity for one in material(pool)} for pool in POOLS}
    assert all(len(found) >= 100 for found in entities.values())
    assert len(set.union(*entities.values())) == sum(map(len, entities.values()))


def test_no_place_name_is_in_two_pools() -> None:
    names = [{region.name for region in regions(pool)} for pool in POOLS]
    assert len(set.union(*names)) == sum(map(len, names))


@pytest.mark.parametrize("pool", POOLS)
def test_the_two_chart_tasks_share_no_series(pool: str) -> None:
    captions, questions = ({one.entity for one in series(pool, part)} for part in (0, 1))
    assert captions and questions and not captions & questions
    assert captions | questions == {one.entity for one in series(pool)}


# Maps


def test_projection_keeps_areas_and_puts_north_up() -> None:
    # A cell of one degree at 60 north is half as wide as one at the equator: area cos(latitude) in square degrees.
    for latitude in (0.0, 60.0):
        cell = np.array([[0, -0.5], [1, -0.5], [1, 0.5], [0, 0.5]]) + np.array([0, latitude])
        area = ring_area(project(cell, (0.5, latitude)))
        assert area == pytest.approx(math.radians(1) ** 2 * math.cos(math.radians(latitude)), rel=1e-3)
    assert project(np.array([[0.0, 1.0]]), (0.0, 0.0))[0, 1] < 0
    assert project(np.array([[-179.0, 0.0]]), (179.0, 0.0))[0, 0] == pytest.approx(math.radians(2), rel=1e-3)


def test_an_outline_is_its_main_part_and_fits_its_box() -> None:
    main = np.array([[0.0, 0.0], [4.0, 0.0], [4.0, 2.0], [0.0, 2.0]])
    island, far = main * 0.3 + np.array([4.2, 0]), main + np.array([40.0, 0])
    drawn = outline([far * 0.5, main, island])
    assert len(drawn.rings) == 2
    points = np.concatenate(drawn.placed((0.1, 0.2, 0.5, 0.6)))
    assert points.min(axis=0) == pytest.approx([0.1, 0.2]) and points.max(axis=0) == pytest.approx([0.5, 0.6])


def test_boxes_are_large_apart_and_tight() -> None:
    for index in range(40):
        rng = random.Random(index)
        placements = place(rng, rng.sample(regions("train"), 2 + index % 3))
        boxes = [placement.box for placement in placements]
        assert len({placement.colour for placement in placements}) == len(placements)
        for left, top, right, bottom in boxes:
            assert right - left >= 30 and bottom - top >= 30
            assert 0 <= left < right <= 99 and 0 <= top < bottom <= 99
        for one, other in zip(boxes, boxes[1:], strict=False):
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def test_the_box_holds_the_colour_of_the_sentence() -> None:
    for index in range(30):
        drawn = map_grounding.draw(random.Random(index), "test", 160)
        name, _, colour = drawn.instruction.split(" one.")[0].partition(" is the ")
        assert drawn.instruction == f"{name} is the {colour} one. Give the box of {name} as x1 y1 x2 y2."
        pixels = np.asarray(drawn.image).astype(int)
        rows, columns = np.nonzero(np.abs(pixels - np.array(rgb(colour))).sum(axis=2) < 12)
        found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) * 100 / 160
        # The line around a region takes a pixel of it at each side, and of a thin tip all of it.
        assert np.abs(found - np.array([int(value) for value in drawn.answers[0].split()])).max() <= 6


def test_no_constant_box_finds_many_regions() -> None:
    rng = random.Random(0)
    boxes = np.array([place(rng, rng.sample(regions("train"), rng.choice((2, 2, 3, 4))))[0].box for _ in range(400)])
    best = 0.0
    for left in range(5, 60, 10):
        for top in range(5, 60, 10):
            for size in (35, 40, 45, 50):
                best = max(best, float(np.mean(iou(boxes, np.array([left, top, left + size, top + size])) >= 0.5)))
    assert best <= 0.25


def iou(boxes_N4: np.ndarray, box_4: np.ndarray) -> np.ndarray:
    low, high = np.maximum(boxes_N4[:, :2], box_4[:2]), np.minimum(boxes_N4[:, 2:], box_4[2:])
    common = np.clip(high - low, 0, None).prod(axis=1)
    return common / ((boxes_N4[:, 2:] - boxes_N4[:, :2]).prod(axis=1) + (box_4[2:] - box_4[:2]).prod() - common)


# Charts


@pytest.mark.parametrize(
    ("heights", "trend", "side"),
    [
        ([0.0, 0.2, 0.3, 0.5, 0.6, 0.8, 0.9, 1.0], "rise", "right"),
        ([1.0, 0.7, 0.6, 0.5, 0.3, 0.2, 0.1, 0.0], "fall", "left"),
        ([0.0, 0.3, 0.7, 1.0, 0.9, 0.5, 0.3, 0.1], "peak", "middle"),
        ([0.8, 0.3, 0.1, 0.0, 0.1, 0.3, 0.7, 1.0], "dip", None),
        ([0.0, 1.0, 0.1, 0.9, 0.0, 0.8, 0.1, 0.3], "zigzag", None),
        ([0.5, 0.6, 0.4, 0.5, 0.6, 0.5, 0.4, 0.5], None, None),
    ],
)
def test_trend_and_highest_side_by_hand(heights: list[float], trend: str | None, side: str | None) -> None:
    values = np.array(heights)
    assert trend_of(values) == trend
    if side is not None:
        assert highest_side(values) == side


def test_mirrored_curves_have_mirrored_trends() -> None:
    mirrored = {"rise": "fall", "fall": "rise", "peak": "peak", "dip": "dip", "zigzag": "zigzag", None: None}
    upside_down = {"rise": "fall", "fall": "rise", "peak": "dip", "dip": "peak", "zigzag": "zigzag", None: None}
    rng = np.random.default_rng(0)
    for _ in range(300):
        heights = np.cumsum(rng.normal(size=9))
        heights = (heights - heights.min()) / np.ptp(heights)
        assert trend_of(heights[::-1]) == mirrored[trend_of(heights)]
        assert trend_of(1 - heights) == upside_down[trend_of(heights)]


def test_resampling_keeps_the_level() -> None:
    assert resampled(np.arange(20.0), 5).tolist() == [1.5, 5.5, 9.5, 13.5, 17.5]
    assert resampled(np.array([0.0, 1.0, 2.0]), 5).tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("trend", TRENDS)
def test_every_pool_has_every_trend_on_every_side(pool: str, trend: Trend) -> None:
    for part in (0, 1):
        for side in SIDES[trend]:
            for points in (8, 16):
                drawn = curve_with(random.Random(points), series(pool, part), trend, points, side)
                assert (drawn.trend, drawn.highest, len(drawn.heights)) == (trend, side, points)


def test_a_trend_that_no_series_has_is_an_error() -> None:
    rising = [one for one in series("train") if one.entity == "series/population/france"] or series("train")[:1]
    with pytest.raises(ValueError, match=r"no window of 1 series has trend 'zigzag' .* Pass more series"):
        curve_with(random.Random(0), rising, "zigzag", 8)


def test_captions_are_five_different_sentences_and_the_parts_are_balanced() -> None:
    drawn = samples(chart_captions, "train", 300)
    assert all(len(set(one.answers)) == 5 for one in drawn)
    assert max(Counter(one.answers[0] for one in drawn).values()) <= 12
    for word, share in (("line chart", 1 / 4), ("purple", 1 / 6), ("that rises,", 1 / 5)):
        assert np.mean([word in one.answers[0] for one in drawn]) == pytest.approx(share, abs=0.08)


def test_ten_annotators_agree_on_the_first_answer() -> None:
    answers = Counter()
    for drawn in samples(chart_questions, "train", 300):
        assert len(drawn.answers) == 10
        assert Counter(drawn.answers).most_common(1)[0][0] == drawn.answers[0]
        assert drawn.answers.count(drawn.answers[0]) >= 6
        answers[drawn.answers[0]] += 1
    # The best constant answer; each question alone is no better guessed.
    assert answers["unanswerable"] / 300 <= 0.28
    assert answers["unanswerable"] / 300 >= 0.12


def test_an_unanswerable_chart_lacks_what_is_asked() -> None:
    for drawn in samples(chart_questions, "test", 60):
        pixels = np.asarray(drawn.image).astype(int).reshape(-1, 3)
        shown = {
            colour
            for colour in ("red", "orange", "green", "blue", "purple", "black")
            if np.count_nonzero(np.abs(pixels - np.array(rgb(colour))).sum(axis=1) < 12) > 40
        }
        unanswerable = drawn.answers[0] == "unanswerable"
        if "trend of the" in drawn.instruction:
            asked = drawn.instruction.split()[6]
            assert (asked not in shown) == unanswerable
        elif "higher" in drawn.instruction:
            assert len(drawn.entities) == (1 if unanswerable else 2)
            assert unanswerable or drawn.answers[0] in shown


# Countries


def test_the_task_has_six_countries_of_each_region_and_pretraining_none_of_them() -> None:
    known = countries("train")
    assert known == countries("test") == countries("validation")
    assert Counter(country.region for country in known) == {region: 6 for region in TASK_COUNTRIES}
    for region, names in TASK_COUNTRIES.items():
        assert {country.name for country in known if country.region == region} == set(names)
    assert len({country.capital for country in known}) == 24
    assert len(countries("pretraining")) >= 80
    assert not {country.name for country in known} & {country.name for country in countries("pretraining")}


def test_facts_and_their_balance() -> None:
    france = next(country for country in countries("train") if country.name == "France")
    assert [country_knowledge.fact(france, question) for question in country_knowledge.QUESTIONS] == [
        "France",
        "Paris",
        "Europe",
    ]
    answers = Counter(drawn.answers[0] for drawn in samples(country_knowledge, "train", 400))
    assert max(answers.values()) / 400 <= 0.14


def test_no_rendering_of_a_country_is_in_two_splits() -> None:
    shown = [{entity for one in samples(country_knowledge, split, 60) for entity in one.entities} for split in SPLITS]
    assert len(set.union(*shown)) == sum(map(len, shown))


# Molecules


def test_features_of_compounds_by_hand() -> None:
    by_entity = {one.entity: one for pool in POOLS for one in compounds(pool)}
    acid = by_entity["compound/O=C(O)c1ccccc1"]
    assert (acid.rings, acid.atoms) == (1, 9)
    assert acid.elements == {"oxygen"} and acid.groups == {"benzene ring", "carboxylic acid"}
    assert by_entity["compound/CCOCC"].groups == {"ether"}
    assert by_entity["compound/CCCCO"].groups == {"alcohol"}
    assert not any("@" in entity or "/" in entity.removeprefix("compound/") for entity in by_entity)


def test_exactly_one_option_is_true() -> None:
    by_entity = {one.entity: one for one in compounds("test")}
    for drawn in samples(molecules, "test", 120):
        (entity,) = drawn.entities
        compound = by_entity[entity]
        right = drawn.options["ABCD".index(drawn.answers[0])]
        if set(drawn.options) == set(molecules.RINGS):
            assert compound.rings == int(right)
        else:
            truths = compound.elements | compound.groups
            assert [option for option in drawn.options if option in truths] == [right]
            assert set(drawn.options) <= set(ELEMENTS) or set(drawn.options) <= set(GROUPS)


def test_neither_letter_nor_option_gives_the_answer_away() -> None:
    rng = random.Random(0)
    letters, right, offered = Counter(), Counter(), Counter()
    for _ in range(600):
        question, options, place, candidates = rng.choice(molecules.KINDS)(rng, "train")
        assert candidates, f"no compound for {question} {options[place]}"
        right[options[place]] += 1
        offered.update(options)
    for drawn in samples(molecules, "train", 200):
        letters[drawn.answers[0]] += 1
    assert max(letters.values()) / 200 <= 0.36
    for option, count in offered.items():
        # Each option is right in one case of four when it is offered, so knowing the options is knowing nothing.
        assert right[option] / count == pytest.approx(0.25, abs=0.12)


# Files of packages


def test_missing_packages_and_files_are_named() -> None:
    with pytest.raises(ValueError, match=r"reads table\.csv from the package 'no_such_package', which isn't installed"):
        package_file("no_such_package", "table.csv")
    with pytest.raises(ValueError, match=r"package 'chemicals' has no file Identifiers/none\.tsv"):
        package_file("chemicals", "Identifiers", "none.tsv")


def test_names_are_plain() -> None:
    assert plain("São Tomé") == "Sao Tome"
    assert slug("St. John's  (City)") == "st-john-s-city"
    for pool in POOLS:
        assert all(region.name.isascii() for region in regions(pool))
