# SPDX-License-Identifier: Apache-2.0
"""Each task metric against worked examples, and the published defects that must not come back.

published_scores.json holds what the published programs gave: vqaEval.py of GT-Vision-Lab/VQA for VQA accuracy, the
package rouge-score 0.1.2, and the definitions of SQuAD's and DocVQA's evaluation written out for F1 and ANLS.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

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


PUBLISHED = json.loads((Path(__file__).parent / "published_scores.json").read_text())
SAMPLES = {
    "anls": [Reference(("Invoice 12", "invoice no. 12")), Reference(("東京",))],
    "rouge_l": [Reference(("a red anchor on blue",)), Reference(("a green leaf", "leaf"))],
    "token_f1": [Reference(("Rio Grande", "the river")), Reference(("3.5",))],
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


@pytest.mark.parametrize("name", ["cider", "cider_percent"])
def test_cider_refuses_references_that_are_all_equal(name: str) -> None:
    same = [Reference(("a red anchor", "An anchor.")), Reference(("an anchor", "A red anchor"))]
    found = METRICS[name].check_split(same)
    assert len(found) == 1 and "all 2 test samples have the same references" in found[0]
    with pytest.raises(ValueError, match=f"{name}: all 2 test samples have the same references .* or use the metric"):
        METRICS[name].score_samples(["a red anchor", "x"], same)
    assert METRICS[name].check_split([*same, Reference(("a leaf",))]) == []


@pytest.mark.parametrize(("words", "reached"), [(1, 250.0), (2, 500.0), (3, 750.0), (4, 1000.0), (6, 1000.0)])
def test_what_short_captions_can_reach(words: int, reached: float) -> None:
    samples = [Reference((" ".join(f"{name}{i}" for i in range(words)),)) for name in ("b", "c")]
    assert METRICS["cider"].ceiling(samples) == pytest.approx(reached)


def test_the_ceiling_is_the_score_of_the_taught_answers() -> None:
    samples = [Reference(("a red boat at sea", "a boat")), Reference(("some green tree", "one tree"))]
    taught = ["a red boat at sea", "some green tree"]
    assert METRICS["cider"].ceiling(samples) == METRICS["cider"].evaluate(taught, samples) < 1000.0
    assert METRICS["vqa"].ceiling([Reference(("x",) + ("y",) * 9), Reference(("x",) * 10)]) == pytest.approx(65.0)


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


@pytest.mark.parametrize("case", PUBLISHED["vqa"], ids=lambda case: repr(case[0])[:20])
def test_vqa_accuracy_is_what_the_published_program_gives(case: tuple[str, list[str], float]) -> None:
    prediction, answers, expected = case
    assert soft_accuracy(prediction, answers) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("said", "answer", "expected"),
    [
        ("t shirt", "t-shirt", 1.0), ("t-shirt", "t shirt", 1.0), ("5", "-5", 1.0), ("10 30", "10:30", 0.0),
        ("dont", "don't", 1.0), ("Two", "2", 1.0), ("none", "0", 1.0), ("1000", "1,000", 1.0), ("35", "3.5", 0.0),
        ("the cat", "The Cat.", 1.0), ("red blue", "red/blue", 1.0), ("its", "it's", 0.0), ("5", ".5", 0.0),
    ],
)  # fmt: skip
def test_vqa_pairs(said: str, answer: str, expected: float) -> None:
    assert soft_accuracy(said, (answer,) * 9 + ("another",)) == expected


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("red, blue", "red blue"),
        ("x - y", "x y"),
        ("somebody'd", "somebodyd"),  # a slip of the published table
        ("what ?", "what"),
        ("." * 33, "."),  # the published program removes 32
        ("the", ""),
    ],
)
def test_vqa_normal_form(text: str, normal: str) -> None:
    assert normalise_vqa(text) == normal


def test_unanimous_answers_are_compared_as_they_are() -> None:
    assert soft_accuracy("the cat", ("The Cat",) * 10) == 0.0
    assert soft_accuracy("the cat", ("The Cat",) * 9 + ("dog",)) == 1.0
    assert soft_accuracy("a", ("a",) * 10) == 1.0  # of which the normalisation would leave nothing


def test_vqa_needs_ten_annotators_to_score() -> None:
    with pytest.raises(ValueError, match="vqa: answers has 2 entries; the metric vqa needs the 10 annotators'"):
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
    assert answer_kind(normal_form(text)) == kind


def test_normal_form() -> None:
    assert normal_form("  The \n PACIFIC. ") == "the pacific"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("cafe\u0301", "café", True), ("「東京」。", "東京", True), ("１２％", "12%", True), ("（Ｂ）", "(b)", True),
        ("Ｔｏｋｙｏ　Ｂａｙ！", "tokyo bay", True), ("don’t", "don't", True), ("−5", "-5", True),
        ("« oui »", "oui", True), (".5", "5", False), ("0.5", ".5", False), ("5.", "5", True), ("-5", "5", False),
        (" .5. ", ".5", True), ("x²", "x2", False), ("50%", "50", False), ("ｶ", "カ", False),
        ("STRASSE", "straße", True),
    ],
)  # fmt: skip
def test_exact_match_and_unicode(one: str, other: str, same: bool) -> None:
    assert METRICS["exact_match"].score_samples([one, other], [Reference((other,)), Reference((one,))]) == [same] * 2


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("b", "B"), ("B.", "B"), ("(B)", "B"), ("B) a cat", "B"), ("B: a cat", "B"), ("Answer: B", "B"),
        ("The answer is B.", "B"), ("Option C", "C"), ("A cat", None), ("cat", None), ("", None), ("D", None),
        ("BC", None), ("1", None), ("B or C", None),
        ("**B**", "B"), ("[B]", "B"), ("Final answer: B", "B"), ("(b)", "B"), ('"B"', "B"), ("“B”", "B"), ("`B`", "B"),
        ("**B.** a cat", "B"), ("**Answer:** (B)", "B"), ("The final answer is **C**.", "C"), ("_B_", "B"),
        ("> B", "B"),
        ("### Answer: B", "B"), ("- B", "B"), ("\\boxed{B}", "B"), ("$\\boxed{B}$", "B"), ("Ｂ", "B"), ("（Ｂ）", "B"),
        ("The correct answer is option B: a cat", "B"), ("B\na cat", "B"), ("B, because it is blue", "B"),
        ("It has fur.\n\nFinal answer: B", "B"), ("A. x\nB. y\nThe answer is B", "B"), ("A. x", "A"),
        ("A: B", None), ("A, B", None), ("A, B and C", None), ("(A) or (B)", None), ("A/B", None), ("(A) (B)", None),
        ("Answer: A\nAnswer: B", None), ("Answer: D", None), ("a.m.", None), ("a.m", None), ("B.x is it", "B"),
        ("The answer is a cat", None),
        ("I think B", None), ("A's", None), ("It is a cat.\nB", None), ("The answer is not B", None), ("**", None),
        ("a", "A"), ("Answer: A cat", None), ("A - B", None), ("Option A shows a cat", None),
    ],
)  # fmt: skip
def test_parse_letter_among_three(text: str, letter: str | None) -> None:
    assert parse_letter(text, ("x", "y", "z")) == letter


def test_an_option_that_is_a_letter_itself_may_follow_its_letter() -> None:
    assert parse_letter("A. B", ("B", "A")) == "A" and parse_letter("A. B", ("x", "y")) is None


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


# --- ANLS, ROUGE-L, F1 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["anls", "rouge_l", "token_f1"])
def test_a_users_metric_is_what_the_published_definition_gives(name: str) -> None:
    for prediction, answers, expected in PUBLISHED[name]:
        found = METRICS[name].score_samples([prediction], [Reference(tuple(answers))])
        assert found == [pytest.approx(expected, abs=1e-12)], (prediction, answers)


def test_anls_by_hand() -> None:
    samples = [Reference(("invoice", "bill"))] * 4
    # One of seven letters wrong; case and spaces do not count; more than half wrong is wrong.
    assert METRICS["anls"].score_samples(["invoise", "INVOICE", "inv", "bull"], samples) == [
        pytest.approx(6 / 7), 1.0, 0.0, 0.75,
    ]  # fmt: skip


def test_rouge_l_by_hand() -> None:
    # "the cat mat": 3 of 3 words said, 3 of 6 of the reference, in order.
    assert METRICS["rouge_l"].score_samples(["the cat mat"], [Reference(("The cat sat on the mat.",))]) == [
        pytest.approx(2 * 1.0 * 0.5 / 1.5)
    ]
    assert "has no word of a-z and 0-9" in METRICS["rouge_l"].check(Reference(("東京",)), test=True)[0]


def test_f1_by_hand() -> None:
    samples = [Reference(("the Rio Grande", "a river"))] * 3
    assert METRICS["token_f1"].score_samples(["Rio Grande!", "Rio Rio", "river Rio"], samples) == [
        1.0, pytest.approx(0.5), pytest.approx(2 / 3),
    ]  # fmt: skip


def test_a_metric_without_its_package_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmole.metrics.base.find_spec", lambda name: None)
    found = ["the metric anls needs the package rapidfuzz, which is not installed; run pip install 'dmole[metrics]'"]
    assert METRICS["anls"].check_split(SAMPLES["anls"]) == found
    with pytest.raises(ValueError, match=f"anls: {found[0]}".replace("[", r"\[")):
        METRICS["anls"].score_samples(["x", "y"], SAMPLES["anls"])


# --- versions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said", "sample", "scores"),
    [
        ("exact_match", ".5", Reference(("5",)), (1.0, 0.0)),
        ("exact_match", "１２", Reference(("12",)), (0.0, 1.0)),
        ("option_letter", "**A**", Reference(("A",), ("x", "y")), (0.0, 1.0)),
        ("vqa", "t shirt", Reference(("t-shirt",) * 9 + ("x",)), (0.0, 1.0)),
        ("vqa", "10 30", Reference(("10:30",) * 9 + ("x",)), (1.0, 0.0)),
        ("vqa", "the cat", Reference(("The Cat",) * 10), (1.0, 0.0)),
    ],
)  # fmt: skip
def test_an_earlier_version_computes_what_it_did(
    name: str, said: str, sample: Reference, scores: tuple[float, float]
) -> None:
    assert tuple(METRICS[name].at(version).score_samples([said], [sample])[0] for version in (1, 2)) == scores


@pytest.mark.parametrize("name", sorted(METRICS))
def test_versions_count_from_one(name: str) -> None:
    metric = METRICS[name]
    kinds = [metric.at(version) for version in range(1, metric.version + 1)]
    assert [kind.version for kind in kinds] == list(range(1, metric.version + 1)) and type(kinds[-1]) is type(metric)
    assert {kind.name for kind in kinds} == {name}
    with pytest.raises(ValueError, match=f"{name}: got version 9; expected one of 1.* Install a newer release"):
        metric.at(9)
