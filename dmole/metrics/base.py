# SPDX-License-Identifier: Apache-2.0
"""What every task metric offers: `points = 100 * mean_n score(prediction_n, references_n)`.

A metric is stateless, and one file: a subclass of `SampleMetric` with a name, `score`, `well_formed` and `check`.
CIDEr alone sees the whole test split at once (its word weights come from all references), and is a `Metric` with
`score_samples`; every other metric scores a sample from that sample alone, whatever batch it was generated in.

`version` counts the computations that went by a name. A run stores the version that scored it, and `dmole verify`
scores with that one: a change of what a metric computes raises `version` and adds the old class to `earlier`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
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
    """One way to score answers. Subclasses set `name`."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    minimum_samples: ClassVar[int] = 1
    """The smallest test split on which the metric means anything."""
    requires: ClassVar[str] = ""
    """The package of the extra `metrics` that scoring needs; "" for none."""
    earlier: "ClassVar[tuple[type[Metric], ...]]" = ()
    """The classes of the versions before this one."""

    @abstractmethod
    def score_samples(self, predictions: Sequence[str], samples: Sequence[Scorable]) -> list[float]:
        """One score per sample, in the order given; 1.0 is right (CIDEr: 0 to 10). Raises on unequal lengths."""

    @abstractmethod
    def well_formed(self, prediction: str, sample: Scorable) -> bool:
        """Whether the prediction has the FORM of an answer (right or wrong): tells forgetting from format collapse."""

    @abstractmethod
    def check(self, sample: Scorable, *, test: bool) -> list[str]:
        """What makes this sample unusable, one sentence each; empty when fine. `test`: it will be scored."""

    def check_split(self, samples: Sequence[Scorable]) -> list[str]:
        """What makes a test split unusable although each of its samples is fine, one sentence each."""
        if not self.requires or find_spec(self.requires) is not None:
            return []
        return [
            f"the metric {self.name} needs the package {self.requires}, which is not installed; "
            "run pip install 'dmole[metrics]'"
        ]

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

    def at(self, version: int) -> "Metric":
        """The metric as it was in `version`. Raises ValueError for one that there is not."""
        kinds = {kind.version: kind for kind in (type(self), *self.earlier)}
        if version not in kinds:
            known = ", ".join(map(str, sorted(kinds)))
            raise ValueError(f"{self.name}: got version {version}; expected one of {known}. Install a newer release.")
        return kinds[version]()

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

    def ceiling(self, samples: Sequence[Scorable]) -> float:
        """The points of a model that says of every sample what training teaches, `answers[0]`.

        100 where one reference suffices; less for annotators who disagree; anything up to 1000 for CIDEr.
        """
        return self.evaluate([sample.answers[0] for sample in samples], samples)

    def well_formed_share(self, predictions: Sequence[str], samples: Sequence[Scorable]) -> float:
        """Share (0 to 1) of predictions that have the form of an answer."""
        check_lengths(self.name, predictions, samples)
        if len(predictions) == 0:
            raise ValueError(f"{self.name}: got no predictions; expected at least one. Give a non-empty test split.")
        shaped = [self.well_formed(p, s) for p, s in zip(predictions, samples, strict=True)]
        return sum(shaped) / len(shaped)


class SampleMetric(Metric):
    """A metric that scores each sample by itself."""

    @abstractmethod
    def score(self, prediction: str, sample: Scorable) -> float:
        """The score of one prediction, from 0 to 1."""

    def score_samples(self, predictions: Sequence[str], samples: Sequence[Scorable]) -> list[float]:
        check_lengths(self.name, predictions, samples)
        if problems := self.check_split(samples):
            raise ValueError(f"{self.name}: {problems[0]}.")
        return [self.score(prediction, sample) for prediction, sample in zip(predictions, samples, strict=True)]


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
