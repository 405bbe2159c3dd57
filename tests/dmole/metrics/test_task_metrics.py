# SPDX-License-Identifier: Apache-2.0
"""Each task metric against worked examples, and the published defects that must not come back."""

import math
from dataclasses import dataclass

import pytest

from dmole.metrics import METRICS
from dmole.metrics.cider import ptb_tokens
from dmole.metrics.iou import intersection_over_union, parse_box
from dmole.metrics.option_letter import parse_letter
from dmole.metrics.text import answer_kind, normal_form
from dmole.metrics.vqa import normalise_vqa, soft_accuracy


@dataclass(frozen=True)
class Reference:
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()


SAMPLES = {
    "cider": [Reference(("a red anchor on blue",)), Reference(("a green leaf",))],
    "cider_percent": [Reference(("a red anchor on blue",)), Reference(("a green leaf",))],
    "exact_match": [Reference(("042",)), Reference(("Europe",))],
    "iou": [Reference(("10 20 55 80",)), Reference(("0 0 9 9",))],
    "option_letter": [Reference(("A",), ("one", "two")), Reference(("B",), ("one", "two", "three"))],
    "vqa": [Reference(("yes",) * 10), Reference(("unanswerable",) * 6 + ("2",) * 4)],
}


@pytest.mark.parametrize("name", sorted(METRICS))
@pytest.mark.parametrize("empty", ["", "  \n", ".", "''"])
def test_an_empty_answer_is_wrong_and_not_well_formed(name: str, empty: str) -> None:
    samples = SAMPLES[name]
    assert METRICS[name].score_samples([empty] * len(samples), samples) == [0.0] * len(samples)
    assert METRICS[name].well_formed_share([empty] * len(samples), samples) == 0.0


@pytest.mark.parametrize("name", sorted(METRICS))
def test_the_first_reference_is_right_and_well_formed(name: str) -> None:
    metric, samples = METRICS[name], SAMPLES[name]
    answers = [sample.answers[0] for sample in samples]
    best = {"cider": 1000.0}.get(name, 100.0)
    if name.startswith("cider"):
        assert 0 < metric.evaluate(answers, samples) <= best  # 4-grams that a short caption lacks score 0
    else:
        assert metric.evaluate(answers, samples) == pytest.approx(best)
    assert metric.well_formed_share(answers, samples) == 1.0
    assert all(metric.check(sample, test=True) == [] for sample in samples)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_unequal_lengths_and_empty_splits_are_errors(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: got 1 predictions for 2 samples; expected one each"):
        METRICS[name].score_samples(["x"], SAMPLES[name])
    with pytest.raises(ValueError, match="got no scores to average; expected at least one"):
        METRICS[name].aggregate([])
    with pytest.raises(ValueError, match="got no predictions; expected at least one"):
        METRICS[name].well_formed_share([], [])


def test_aggregate_is_in_points() -> None:
    assert METRICS["exact_match"].aggregate([1.0, 0.0, 0.0, 1.0]) == 50.0


# --- CIDEr -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ('A man\'s "red" hat.', ["a", "man", "'s", "red", "hat"]),
        ("It isn’t here -- really...", ["it", "is", "n't", "here", "really"]),  # noqa: RUF001
        ("You cannot, can't they'll", ["you", "can", "not", "ca", "n't", "they", "'ll"]),
        ("3.5 of 1,000 at 12:30 in the 1960s", ["3.5", "of", "1,000", "at", "12:30", "in", "the", "1960s"]),
        ("the U.S. economy (well-known)", ["the", "u.s.", "economy", "well-known"]),
        ("$5 & 50% #1", ["$", "5", "&", "50", "%", "#", "1"]),
        ("Año café, naïve", ["año", "café", "naïve"]),
        (" \n ", []),
    ],
)
def test_caption_tokens(caption: str, tokens: list[str]) -> None:
    assert ptb_tokens(caption) == tokens


def test_cider_of_two_unigram_captions_by_hand() -> None:
    # Two samples, one word each, all different: idf = log 2 for every unigram, n = 2..4 empty.
    samples = [Reference(("anchor",)), Reference(("leaf",))]
    # Perfect: cosine 1 for unigrams, 0 for the rest, mean over four times ten = 2.5.
    assert METRICS["cider"].score_samples(["anchor", "leaf"], samples) == pytest.approx([2.5, 2.5])
    assert METRICS["cider"].score_samples(["leaf", "leaf"], samples) == pytest.approx([0.0, 2.5])
    # "anchor tree": tfidf (log 2, log 2 - log 1); the clipped product over norms is 1 / sqrt 2. The scorer's length is
    # its number of bigrams: one against none, so the penalty is exp(-1/72).
    expected = 2.5 * math.exp(-1 / 72) * (1 / math.sqrt(2))
    assert METRICS["cider"].score_samples(["anchor tree", "leaf"], samples)[0] == pytest.approx(expected)


def test_cider_is_a_corpus_metric() -> None:
    one = Reference(("a red anchor",))
    alike, unlike = Reference(("a red leaf",)), Reference(("some green tree",))
    said = ["a red boat", "x"]
    with_alike = METRICS["cider"].score_samples(said, [one, alike])[0]
    with_unlike = METRICS["cider"].score_samples(said, [one, unlike])[0]
    assert with_alike == 0.0  # what every reference says weighs nothing
    assert with_unlike > 0
    with pytest.raises(ValueError, match="got 1 test samples; expected at least 2, because its word weights"):
        METRICS["cider"].score_samples(["a"], [one])


def test_caption_form_is_judged_by_length() -> None:
    reference = Reference(("a red anchor on blue ground", "anchor on blue"))
    assert METRICS["cider"].well_formed("some wrong words here", reference)
    assert not METRICS["cider"].well_formed("B", reference)
    assert not METRICS["cider"].well_formed("a " * 13, reference)


# --- IoU -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("10 20 55 80", (10, 20, 55, 80)),
        (" [0, 0, 9, 99] ", (0, 0, 9, 99)),
        ("10 20 55 8", None),  # a last coordinate cut off to one digit turns the box over
        ("10 20 55", None),
        ("10 20 55 80 90", None),
        ("10 20 55 100", None),
        ("55 20 10 80", None),
        ("10 20 10 80", None),
        ("the box is 10 20 55 80", None),
        ("-1 20 55 80", None),
    ],
)
def test_parse_box(text: str, box: tuple[int, int, int, int] | None) -> None:
    assert parse_box(text) == box


def test_the_last_coordinate_counts() -> None:
    # The published code lost the last coordinate; here only the last one differs and it decides.
    samples = [Reference(("10 10 50 90",))] * 2
    assert METRICS["iou"].score_samples(["10 10 50 90", "10 10 50 20"], samples) == [1.0, 0.0]


def test_iou_by_hand() -> None:
    assert intersection_over_union((0, 0, 10, 10), (0, 0, 10, 5)) == pytest.approx(0.5)
    assert intersection_over_union((0, 0, 10, 10), (5, 5, 15, 15)) == pytest.approx(25 / 175)
    assert intersection_over_union((0, 0, 10, 10), (10, 0, 20, 10)) == 0.0
    # 0.5 itself is a hit.
    assert METRICS["iou"].score_samples(["0 0 10 5"], [Reference(("0 0 10 10",))]) == [1.0]
    assert METRICS["iou"].score_samples(["0 0 10 4"], [Reference(("0 0 10 10",))]) == [0.0]


def test_a_reference_that_is_no_box_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"got references \['left'\]; expected boxes like '10 20 55 80'"):
        METRICS["iou"].score_samples(["0 0 10 4"], [Reference(("left",))])
    assert METRICS["iou"].check(Reference(("10 20 5 30",)), test=False)


# --- VQA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_leave_one_annotator_out(agreeing: int, expected: float) -> None:
    answers = ("red",) * agreeing + ("blue",) * (10 - agreeing)
    assert soft_accuracy("red", answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Cat.", "cat"),
        ("Two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("red/blue", "red blue"),
        ("red, blue", "red blue"),
        ("3.5", "3.5"),
        ("don't", "dont"),
        ("what?", "what"),
        ("what ?", "what"),
        ("a\nb", "b"),
        ("the", ""),
    ],
)
def test_vqa_normal_form(text: str, normal: str) -> None:
    assert normalise_vqa(text) == normal


def test_both_sides_are_normalised_even_when_all_annotators_agree() -> None:
    assert soft_accuracy("the cat", ("The Cat",) * 10) == 1.0


def test_an_answer_that_normalises_to_nothing_never_matches() -> None:
    assert soft_accuracy("the", ("a",) * 10) == 0.0
    assert METRICS["vqa"].check(Reference(("a",) * 10), test=True) != []


def test_vqa_needs_ten_annotators_to_score() -> None:
    with pytest.raises(ValueError, match=r"got 2 answers \['x', 'x'\]; expected the 10 annotators' answers"):
        METRICS["vqa"].score_samples(["x"], [Reference(("x", "x"))])
    assert METRICS["vqa"].check(Reference(("x", "x")), test=False) == []
    assert "needs the 10 annotators'" in METRICS["vqa"].check(Reference(("x", "x")), test=True)[0]


def test_vqa_form() -> None:
    reference = Reference(("up",) * 10)
    for form, good in [("down", True), ("7", True), ("B", False), ("1 2 3 4", False), ("w x y z going on", False)]:
        assert METRICS["vqa"].well_formed(form, reference) is good, form


# --- exact match and option letter -----------------------------------------------------------------------------------


def test_exact_match_forgives_case_space_and_outer_punctuation_only() -> None:
    sample = Reference(("Rio  Grande", "3.5"))
    right = ["rio grande", " Rio Grande. ", "3.5"]
    wrong = ["rio", "the rio grande", "35", "rio grande and 3.5", "3.50"]
    assert METRICS["exact_match"].score_samples(right, [sample] * 3) == [1.0] * 3
    assert METRICS["exact_match"].score_samples(wrong, [sample] * 5) == [0.0] * 5


def test_empty_prediction_does_not_match_a_reference_of_punctuation() -> None:
    assert METRICS["exact_match"].score_samples(["", "?"], [Reference(("...",))] * 2) == [0.0, 0.0]


def test_exact_match_form_is_the_kind_of_the_reference() -> None:
    number, word = Reference(("042",)), Reference(("Europe",))
    metric = METRICS["exact_match"]
    assert metric.well_formed("7", number) and not metric.well_formed("seven", number)
    assert not metric.well_formed("1 2 3 4", number) and not metric.well_formed("B", word)
    assert metric.well_formed("South America", word) and not metric.well_formed("a b c d", word)


@pytest.mark.parametrize(
    ("text", "kind"),
    [("", "empty"), (" . ", "empty"), ("042", "number"), ("3.5 %", "number"), ("1 2 3 4", "numbers"),
     ("[1, 2, 3, 4]", "numbers"), ("B", "letter"), ("(b)", "letter"), ("red", "words"), ("7 cats", "words")],
)  # fmt: skip
def test_answer_kind(text: str, kind: str) -> None:
    assert answer_kind(text) == kind


def test_normal_form() -> None:
    assert normal_form("  The \n PACIFIC. ") == "the pacific"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("b", "B"), ("B.", "B"), ("(B)", "B"), ("B) a cat", "B"), ("B: a cat", "B"), ("Answer: B", "B"),
        ("The answer is B.", "B"), ("Option C", "C"), ("A cat", None), ("cat", None), ("", None), ("D", None),
        ("BC", None), ("1", None), ("B or C", None),
    ],
)  # fmt: skip
def test_parse_letter_among_three(text: str, letter: str | None) -> None:
    assert parse_letter(text, ("x", "y", "z")) == letter


def test_each_sample_is_scored_with_its_own_options() -> None:
    # The published defect: the whole batch was post-processed with the options of its first sample.
    two = Reference(("A",), ("cat", "dog"))
    four = Reference(("D",), ("cat", "dog", "cow", "pig"))
    for samples, predictions, expected in [
        ([two, four], ["D", "D"], [0.0, 1.0]),
        ([four, two], ["D", "D"], [1.0, 0.0]),
    ]:
        assert METRICS["option_letter"].score_samples(predictions, samples) == expected
    assert [METRICS["option_letter"].well_formed("D", s) for s in (two, four)] == [False, True]


def test_option_letter_wants_a_listed_letter() -> None:
    metric = METRICS["option_letter"]
    assert "options is missing" in metric.check(Reference(("A",)), test=False)[0]
    for answers in [("C",), ("cat",), ("AB",), ("a",), ("A", "B")]:
        assert (
            "expected exactly one of the option letters A, B"
            in metric.check(Reference(answers, ("cat", "dog")), test=False)[0]
        )


def test_cider_percent_is_a_tenth_of_cider() -> None:
    samples, said = SAMPLES["cider"], ["a red anchor", "a leaf on blue"]
    assert METRICS["cider_percent"].evaluate(said, samples) == pytest.approx(
        METRICS["cider"].evaluate(said, samples) / 10
    )
