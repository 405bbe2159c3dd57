# SPDX-License-Identifier: Apache-2.0
"""A stream is a sequence of tasks; a task is three splits of samples; a sample is images, an instruction and answers.

Plain frozen data, no behaviour beyond choosing an order and a size. `dmole.data.reading` makes streams from folders and
has already rejected whatever could not be trained on or scored. A split is a sequence: a tuple in memory, or `Rows`
that are read from the disk one by one (`dmole.data.stored`).
"""

import hashlib
import heapq
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal, overload

from dmole.metrics import METRICS


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A message before the answer. A part is text, or None for the next of the sample's images."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[str | None, ...]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question about an image, several or none, in the order in which the prompt shows them.

    `answers[0]` is what training teaches; all answers are references at test. Multiple choice: `options` holds the
    texts, `answers[0]` the letter. `entities` names what the sample shows, so that leaks between splits can be found.

    `turns` holds everything before the answer where that is more than the images and then the instruction: a system
    message, earlier turns, images between texts. `instruction` is then the text of the last question. `taught` says
    which answers of several turns are trained: the last one, or all; the test asks for the last one alone.
    """

    id: str
    images: tuple[Path, ...]
    instruction: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    entities: tuple[str, ...] = ()
    turns: tuple[Turn, ...] = ()
    taught: Literal["last", "all"] = "last"

    @property
    def asked(self) -> tuple[Turn, ...]:
        """The messages before the answer."""
        return self.turns or (Turn(role="user", parts=(*(None for _ in self.images), self.instruction)),)


class Rows(Sequence[Sample]):
    """Samples that are made when they are asked for. A slice is a tuple."""

    @abstractmethod
    def row(self, place: int) -> Sample:
        """The sample at 0 <= place < len(self)."""

    @overload
    def __getitem__(self, place: int) -> Sample: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[Sample, ...]: ...

    def __getitem__(self, place: int | slice) -> Sample | tuple[Sample, ...]:
        if isinstance(place, slice):
            return tuple(self.row(each) for each in range(*place.indices(len(self))))
        return self.row(range(len(self))[place])


class _Picked(Rows):
    """Some samples of others, by their places."""

    def __init__(self, samples: Sequence[Sample], places: Sequence[int]) -> None:
        self._samples, self._places = samples, places

    def __len__(self) -> int:
        return len(self._places)

    def row(self, place: int) -> Sample:
        return self._samples[self._places[place]]


class _Joined(Rows):
    """Several sequences of samples, one after another."""

    def __init__(self, parts: Sequence[Sequence[Sample]]) -> None:
        self._parts = [part for part in parts if part]
        self._ends = list(accumulate(map(len, self._parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, place: int) -> Sample:
        part = bisect_right(self._ends, place)
        return self._parts[part][place - (self._ends[part - 1] if part else 0)]


def joined(parts: Iterable[Sequence[Sample]]) -> Sequence[Sample]:
    """The samples of all parts in one sequence; a tuple where all of them are in memory."""
    listed = list(parts)
    if any(isinstance(part, Rows) for part in listed):
        return _Joined(listed)
    return tuple(sample for part in listed for sample in part)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of a stream: its metric and its splits. `validation` may be empty."""

    name: str
    metric: str
    train: Sequence[Sample]
    validation: Sequence[Sample]
    test: Sequence[Sample]


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Tasks in the order in which they will be learned.

    `notes`: what a reader should know and nothing refuses, each with its file and line. `image_sizes`: (width, height)
    of the images that have been decoded already.
    """

    name: str
    tasks: tuple[Task, ...]
    notes: tuple[str, ...] = field(default=(), compare=False)
    image_sizes: Mapping[Path, tuple[int, int]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    def task(self, name: str) -> Task:
        """The task called `name`."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise ValueError(f"task is {name!r}; stream {self.name!r} has {', '.join(self.task_names)}. Use one of these.")

    def reorder(self, names: Sequence[str]) -> "Stream":
        """The same tasks in the order given. Every task must be named once."""
        if sorted(names) != sorted(self.task_names):
            missing = [name for name in self.task_names if name not in names]
            unknown = [name for name in names if name not in self.task_names]
            repeated = sorted({name for name in names if list(names).count(name) > 1})
            raise ValueError(
                f"order is {', '.join(names)}; expected every task of stream {self.name!r} once "
                f"(missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}; "
                f"repeated: {', '.join(repeated) or 'none'}). Name each of {', '.join(self.task_names)} once."
            )
        return replace(self, tasks=tuple(self.task(name) for name in names))

    def limit(self, *, train: int | None = None, test: int | None = None, validation: int | None = None) -> "Stream":
        """At most so many samples of each split of every task; None keeps all.

        Which samples stay is decided by the hash of their ids, not by their place in the file (files are often sorted
        by answer), and a smaller limit keeps a subset of what a larger one keeps. The order in the file is kept.
        """
        for name, value, least in (("train", train, 2), ("test", test, 1), ("validation", validation, 0)):
            if value is not None and value < least:
                raise ValueError(f"{name} limit is {value}; expected at least {least}, or None for all. Raise it.")
        tasks = []
        for task in self.tasks:
            least = METRICS[task.metric].minimum_samples
            if test is not None and test < least:
                raise ValueError(
                    f"test limit is {test}; task {task.name!r} is scored by {task.metric}, which needs at least "
                    f"{least} test samples. Raise the limit."
                )
            kept = _keep(task.test, test)
            if test is not None and (problems := METRICS[task.metric].check_split(kept)):
                raise ValueError(f"test limit is {test}; of task {task.name!r} {problems[0]}. Raise the limit.")
            tasks.append(
                replace(
                    task,
                    train=_keep(task.train, train),
                    validation=_keep(task.validation, validation),
                    test=kept,
                )
            )
        return replace(self, tasks=tuple(tasks))


def _keep(samples: Sequence[Sample], limit: int | None) -> Sequence[Sample]:
    if limit is None or limit >= len(samples):
        return samples
    ranked = ((hashlib.sha256(sample.id.encode()).digest(), place) for place, sample in enumerate(samples))
    places = sorted(place for _, place in heapq.nsmallest(limit, ranked))
    if isinstance(samples, Rows):
        return _Picked(samples, places)
    return tuple(samples[place] for place in places)
