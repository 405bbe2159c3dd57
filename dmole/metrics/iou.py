# SPDX-License-Identifier: Apache-2.0
"""score = 1 if area(P & R) / area(P | R) >= 0.5 else 0: grounding accuracy at IoU 0.5 (RefCOCO's, SK-VG's).

A box is "left top right bottom": four whole numbers from 0 to 99 in hundredths of the image's sides. Coordinates are
points on a continuous line, so "10 10 20 20" has area 100 and a box without width or height is no box. A prediction
must hold exactly four numbers: one that was cut off after three, or whose right edge is left of its left, is wrong
rather than repaired.
"""

import re
from typing import ClassVar

from dmole.metrics.base import SampleMetric, Scorable

IOU_THRESHOLD = 0.5
_BOX = re.compile(r"[\[(]?\s*(\d{1,2})[\s,]+(\d{1,2})[\s,]+(\d{1,2})[\s,]+(\d{1,2})\s*[\])]?\.?")

Box = tuple[int, int, int, int]


def parse_box(text: str) -> Box | None:
    """The box written in `text`, brackets and commas allowed; None unless it is exactly one box with an area."""
    match = _BOX.fullmatch(text.strip())
    if match is None:
        return None
    left, top, right, bottom = (int(group) for group in match.groups())
    return (left, top, right, bottom) if left < right and top < bottom else None


def intersection_over_union(first: Box, second: Box) -> float:
    """`area(A & B) / area(A | B)` in [0, 1]."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    common = width * height
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return common / (areas - common)


class IoU(SampleMetric):
    """Right when the box overlaps one of the references by half."""

    name: ClassVar[str] = "iou"

    def score(self, prediction: str, sample: Scorable) -> float:
        box = parse_box(prediction)
        references = [reference for answer in sample.answers if (reference := parse_box(answer)) is not None]
        if len(references) != len(sample.answers):
            raise ValueError(
                f"iou: got references {list(sample.answers)}; expected boxes like '10 20 55 80' "
                "(left top right bottom, 0..99, left < right, top < bottom). Fix the data set."
            )
        return float(box is not None and any(intersection_over_union(box, r) >= IOU_THRESHOLD for r in references))

    def well_formed(self, prediction: str, sample: Scorable) -> bool:
        """Four whole numbers from 0 to 99 that make a box with an area."""
        return parse_box(prediction) is not None

    def check(self, sample: Scorable, *, test: bool) -> list[str]:
        return [
            f"answers[{i}] is {answer!r}; expected a box like '10 20 55 80' "
            "(left top right bottom, whole numbers 0..99, left < right, top < bottom)"
            for i, answer in enumerate(sample.answers)
            if parse_box(answer) is None
        ]
