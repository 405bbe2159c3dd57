# SPDX-License-Identifier: Apache-2.0
"""score = mean over the annotators k of min(1, #{j != k : answer_j = prediction} / 3): VQA accuracy.

Antol et al., "VQA: Visual Question Answering" (ICCV 2015). It is what the authors' program gives
(vqaEval.py of GT-Vision-Lab/VQA, BSD 2-Clause, see NOTICE), step by step:

1. line breaks and tabs become spaces, outer spaces go;
2. where all annotators wrote the same, the prediction must be that text as it is: "The Cat" ten times is not "the cat";
3. otherwise both sides are normalised. A mark of `MARKS` is deleted where it touches a space anywhere in the text, or
   where the text holds a number with a comma; else it becomes a space. So "t-shirt" is "t shirt" and "-5" is "5"; the
   colon is no mark and "10:30" is not "10 30". The first 32 periods that no digit follows go. Lower case; number words
   up to ten become digits ("none" too: 0); a, an and the go; missing apostrophes come from a table ("dont": "don't");
4. each annotator is left out once: an answer given by one of ten scores 0.3, by three 0.9, by four or more 1.0.

The formula needs ten annotators: were there three who agree, their answer would score min(1, 2 / 3). Other numbers of
answers are therefore refused; `exact_match` scores those.
"""

import re
from collections.abc import Sequence
from typing import ClassVar

from dmole.metrics.base import Metric, SampleMetric, Scorable
from dmole.metrics.earlier import version_1
from dmole.metrics.text import answer_kind, normal_form

ANNOTATORS = 10
MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = frozenset(("a", "an", "the"))
# Written and restored form in turn, as published, with its slips ("somebody'd": "somebodyd").
_PAIRS = """
    aint ain't arent aren't cant can't couldve could've couldnt couldn't couldn'tve couldn't've couldnt've couldn't've
    didnt didn't doesnt doesn't dont don't hadnt hadn't hadnt've hadn't've hadn'tve hadn't've hasnt hasn't havent
    haven't hed he'd hed've he'd've he'dve he'd've hes he's howd how'd howll how'll hows how's isnt isn't itd it'd
    itd've it'd've it'dve it'd've itll it'll let's let's maam ma'am mightnt mightn't mightnt've mightn't've mightn'tve
    mightn't've mightve might've mustnt mustn't mustve must've neednt needn't notve not've oclock o'clock oughtnt
    oughtn't ow's'at 'ow's'at 'ows'at 'ow's'at 'ow'sat 'ow's'at shant shan't shed've she'd've she'dve she'd've she's
    she's shouldve should've shouldnt shouldn't shouldnt've shouldn't've shouldn'tve shouldn't've somebody'd somebodyd
    somebodyd've somebody'd've somebody'dve somebody'd've somebodyll somebody'll somebodys somebody's someoned
    someone'd someoned've someone'd've someone'dve someone'd've someonell someone'll someones someone's somethingd
    something'd somethingd've something'd've something'dve something'd've somethingll something'll thats that's thered
    there'd thered've there'd've there'dve there'd've therere there're theres there's theyd they'd theyd've they'd've
    they'dve they'd've theyll they'll theyre they're theyve they've twas 'twas wasnt wasn't wed've we'd've we'dve
    we'd've weve we've werent weren't whatll what'll whatre what're whats what's whatve what've whens when's whered
    where'd wheres where's whereve where've whod who'd whod've who'd've who'dve who'd've wholl who'll whos who's whove
    who've whyll why'll whyre why're whys why's wont won't wouldve would've wouldnt wouldn't wouldnt've wouldn't've
    wouldn'tve wouldn't've yall y'all yall'll y'all'll y'allll y'all'll yall'd've y'all'd've y'alld've y'all'd've
    y'all'dve y'all'd've youd you'd youd've you'd've you'dve you'd've youll you'll youre you're youve you've
""".split()
_CONTRACTIONS = dict(zip(_PAIRS[::2], _PAIRS[1::2], strict=True))
_NUMBER_WITH_COMMA = re.compile(r"[0-9],[0-9]")
_LOOSE_PERIOD = re.compile(r"\.(?![0-9])")
_PERIODS = 32  # The published call passes re.UNICODE, which is 32, where re.sub expects a count.


def normalise_vqa(text: str) -> str:
    """Step 3 of the module's docstring. May be empty ("the" -> "")."""
    delete_all = _NUMBER_WITH_COMMA.search(text) is not None
    shown = text
    for mark in MARKS:
        deleted = delete_all or mark + " " in text or " " + mark in text
        shown = shown.replace(mark, "" if deleted else " ")
    words = [_DIGITS.get(word, word) for word in _LOOSE_PERIOD.sub("", shown, count=_PERIODS).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The accuracy of one prediction, in [0, 1]; see the module's docstring."""
    said, *given = (text.replace("\n", " ").replace("\t", " ").strip() for text in (prediction, *answers))
    if len(set(given)) > 1:
        said, *given = (normalise_vqa(text) for text in (said, *given))
    agrees = [answer == said for answer in given]
    return sum(min(1.0, (sum(agrees) - own) / 3) for own in agrees) / len(agrees)


class VqaAccuracy(SampleMetric):
    """Soft accuracy over ten annotators' answers."""

    name: ClassVar[str] = "vqa"
    version: ClassVar[int] = 2
    earlier: ClassVar[tuple[type[Metric], ...]] = (version_1.VqaAccuracy,)

    def score(self, prediction: str, sample: Scorable) -> float:
        if problems := self.check(sample, test=True):
            raise ValueError(f"vqa: {problems[0]}.")
        return soft_accuracy(prediction, sample.answers)

    def well_formed(self, prediction: str, sample: Scorable) -> bool:
        """A short answer: a number or words (not an option letter, not a box), at most twice the longest reference."""
        longest = max(len(answer.split()) for answer in sample.answers)
        kinds = {"number", "words"} | {answer_kind(normal_form(answer)) for answer in sample.answers} - {"empty"}
        return len(prediction.split()) <= max(3, 2 * longest) and answer_kind(normal_form(prediction)) in kinds

    def check(self, sample: Scorable, *, test: bool) -> list[str]:
        if not test or len(sample.answers) == ANNOTATORS:
            return []
        return [
            f"answers has {len(sample.answers)} entries; the metric vqa needs the {ANNOTATORS} annotators' answers "
            "(repeat an answer that several gave), or use the metric exact_match"
        ]
