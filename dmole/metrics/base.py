# SPDX-License-Identifier: Apache-2.0
"""What every task metric offers: `points = 100 * mean_n score(prediction_n, references_n)`.

A metric is stateless. `score_samples` sees the whole test split at once because CIDEr is a corpus metric (its document
frequencies come from the references of the split); every other metric scores a sample from that sample alone, with
that sample's own answers and options, whatever batch it was generated in.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from string import ascii_uppercase
from typing import ClassVar, Protocol

import numpy as np


class Scorable(Protocol):
    """The part of a sample that a metric may see. `dmole.data.Sample` is one; a line of `references.jsonl` another."""

    @property
    def answers(self) -> tuple[str, ...]: ...

    @property
    def options(self) -> tuple[str, ...]: ...


class Metric(ABC):
    """One way to score answers. Subclasses set `name`, `title` and `minimum_samples`."""

    name: ClassVar[str]
    title: ClassVar[str]
    minimum_samples: ClassVar[int] = 1
    """The smallest test split on which the metric means anything."""

    @abstractmethod
    def score_samples(self, predictions: Sequence[str], samples: Sequence[Scorable]) -> list[float]:
        """One score per sample, in the order given; 1.0 is right (CIDEr: 0 to 10). Raises on unequal lengths."""

    @abstractmethod
    def well_formed(self, prediction: str, sample: Scorable) -> bool:
        """Whether the prediction has the FORM of an answer (right or wrong): tells forgetting from format collapse."""

    @abstractmethod
    def check(self, sample: Scorable, *, test: bool) -> list[str]:
        """What makes this sample unusable, one sentence each; empty when fine. `test`: it will be scored."""

    def check_options(self, sample: Scorable) -> list[str]:
        """Problems of an option list beside free-text answers: one of the answers must be an option or its letter."""
        if not sample.options:
            return []
        letters = option_letters(sample.options)
        if any(answer in letters or answer in sample.options for answer in sample.answers):
            return []
        return [
            f"options {list(sample.options)} do not hold the answer {sample.answers[0]!r}; "
            "expected the letter or the text of an option"
        ]

    def aggregate(self, scores: Sequence[float]) -> float:
        """`100 * mean(scores)`, in points. For CIDEr the scores must be those of the full split, see `cider.py`."""
        if len(scores) == 0:
            raise ValueError(
                f"{self.name}: got no scores to average; expected at least one. Give a non-empty test split."
            )
        return 100.0 * float(np.mean(np.asarray(scores, dtype=np.float64)))

    def evaluate(self, predictions: Sequence[str], samples: Sequence[Scorable]) -> float:
        """`aggregate(score_samples(...))`: the number that goes into the matrix."""
        return self.aggregate(self.score_samples(predictions, samples))

    def well_formed_share(self, predictions: Sequence[str], samples: Sequence[Scorable]) -> float:
        """Share (0 to 1) of predictions that have the form of an answer."""
        check_lengths(self.name, predictions, samples)
        if len(predictions) == 0:
            raise ValueError(f"{self.name}: got no predictions; expected at least one. Give a non-empty test split.")
        shaped = [self.well_formed(p, s) for p, s in zip(predictions, samples, strict=True)]
        return sum(shaped) / len(shaped)


def option_letters(options: Sequence[str]) -> tuple[str, ...]:
    """The letters of the options in order: A, B, C for three."""
    return tuple(ascii_uppercase[: len(options)])


def check_lengths(name: str, predictions: Sequence[str], samples: Sequence[Scorable]) -> None:
    """Raise if the two lists cannot be paired."""
    if len(predictions) != len(samples):
        raise ValueError(
            f"{name}: got {len(predictions)} predictions for {len(samples)} samples; expected one each. "
            "Pass the predictions in the order of the samples."
        )
