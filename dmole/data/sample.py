# SPDX-License-Identifier: Apache-2.0
"""A stream is a sequence of tasks; a task is three splits of samples; a sample is images, an instruction and answers.

Plain frozen data, no behaviour beyond choosing an order and a size. `dmole.data.reading` makes streams from folders and
has already rejected whatever could not be trained on or scored.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dmole.metrics import METRICS


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question about an image, several or none, in the order in which the prompt shows them.

    `answers[0]` is what training teaches; all answers are references at test. Multiple choice: `options` holds the
    texts, `answers[0]` the letter. `entities` names what the sample shows, so that leaks between splits can be found.
    """

    id: str
    images: tuple[Path, ...]
    instruction: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    entities: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of a stream: its metric and its splits. `validation` may be empty."""

    name: str
    metric: str
    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    test: tuple[Sample, ...]


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


def _keep(samples: tuple[Sample, ...], limit: int | None) -> tuple[Sample, ...]:
    if limit is None or limit >= len(samples):
        return samples
    ranked = sorted(samples, key=lambda sample: hashlib.sha256(sample.id.encode()).digest())
    kept = {sample.id for sample in ranked[:limit]}
    return tuple(sample for sample in samples if sample.id in kept)
