# SPDX-License-Identifier: Apache-2.0
"""All test sets in one queue of generation batches, scored task by task: a row of the matrix A[t][i].

A batch mixes samples of different tasks, as a server would meet them: whoever routes per batch instead of per sample
loses points here. Within windows of a few batches the queue is sorted by prompt length, which spares padding.

Which stages test which tasks is decided by the method and by `evaluation.stages` (`evaluated_stages`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, overload

import torch
from accelerate import Accelerator

from dmole.config import EvaluationSettings
from dmole.data.collate import collate
from dmole.data.sample import Sample, Task
from dmole.methods.base import Method, Stage
from dmole.metrics import METRICS
from dmole.profile import Profile
from dmole.runs.generation import generate
from dmole.seeding import derived_generator
from dmole.training.processes import gathered, is_sharded, process

if TYPE_CHECKING:
    from dmole.models.vision_language import VisionLanguageModel

SORTING_WINDOW = 4  # batches


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A raw answer. `route` names the experts' tasks, best first; () is the base model, None an unrouted method.

    `cut`: generation stopped at `evaluation.max_new_tokens` and not at an end token.
    """

    task: str
    id: str
    text: str
    route: tuple[str, ...] | None
    cut: bool


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One row: by task its points, its share of well-formed answers and its count of cut ones; and all predictions."""

    points: dict[str, float]
    well_formed: dict[str, float]
    cut: dict[str, int]
    predictions: tuple[Prediction, ...]


def evaluated_stages(stages: Sequence[Stage], mode: Literal["all", "diagonal", "last"]) -> list[Stage]:
    """The stages with what each of them tests under `evaluation.stages`.

    all         what the method's protocol says: N tasks after each of N stages for a sequential method
    diagonal    each stage tests the task that it learned; a stage that learned a union of tasks tests all of them
    last        each task is tested once, in the last stage of the protocol that tests it
    """
    chosen = []
    for place, stage in enumerate(stages):
        tested = stage.evaluates
        if mode == "diagonal" and stage.task.name in tested:
            tested = (stage.task.name,)
        elif mode == "last":
            later = {name for other in stages[place + 1 :] for name in other.evaluates}
            tested = tuple(name for name in tested if name not in later)
        chosen.append(dataclasses.replace(stage, evaluates=tested))
    return chosen


def final_rows(stages: Sequence[Stage], tasks: Sequence[str]) -> dict[str, int]:
    """By task, the row of the matrix that holds its final score in the method's protocol: the last one that tests it.

    N for every task of a sequential method, the task's own row for Finetune, 0 where no stage tests it (Zero-shot).
    """
    return {task: max((stage.row for stage in stages if task in stage.evaluates), default=0) for task in tasks}


class GenerationQueue(Sequence[list[tuple[str, Sample]]]):
    """Batches of (task name, test sample); a sample is read when its batch is asked for."""

    def __init__(self, tasks: Sequence[Task], batches: Sequence[Sequence[tuple[int, int]]]) -> None:
        self._tasks, self._batches = tasks, batches

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, place: int) -> list[tuple[str, Sample]]: ...

    @overload
    def __getitem__(self, place: slice) -> GenerationQueue: ...

    def __getitem__(self, place: int | slice) -> list[tuple[str, Sample]] | GenerationQueue:
        if isinstance(place, slice):
            return GenerationQueue(self._tasks, self._batches[place])
        return [(self._tasks[task].name, self._tasks[task].test[row]) for task, row in self._batches[place]]


def generation_queue(vlm: VisionLanguageModel, tasks: Sequence[Task], batch_size: int) -> GenerationQueue:
    """Every test sample once, in batches of (task name, sample); the same for every method and stage.

    >>> # tasks of 4 and 2 samples, batch_size 3 -> e.g. [[a2, b1, a4], [b2, a1, a3]]
    """
    items = [(number, row) for number, task in enumerate(tasks) for row in range(len(task.test))]
    generator = derived_generator("generation queue", len(items))
    order = torch.randperm(len(items), generator=generator, device="cpu").tolist()
    # By images first: what pads a batch most.
    lengths = [
        (len(sample.images), len(vlm.tokenizer.tokenize(sample.instruction))) for task in tasks for sample in task.test
    ]
    window = batch_size * SORTING_WINDOW
    batches: list[list[tuple[int, int]]] = []
    for start in range(0, len(order), window):
        chosen = sorted(order[start : start + window], key=lambda index: lengths[index])
        batches += [
            [items[index] for index in chosen[at : at + batch_size]] for at in range(0, len(chosen), batch_size)
        ]
    return GenerationQueue(tasks, batches)


def predict(
    method: Method,
    queue: Sequence[Sequence[tuple[str, Sample]]],
    settings: EvaluationSettings,
    accelerator: Accelerator,
    *,
    profile: Profile,
) -> Iterator[list[Prediction]]:
    """The predictions of each batch of the queue, in order, in the precision of `accelerator.autocast`."""
    method.vlm.model.train(False)
    for items in queue:
        with torch.inference_mode():
            with profile.part("evaluation_data"):
                batch = collate(method.vlm, [sample for _, sample in items], with_answers=False)
            with profile.part("evaluation_generate"), method.evaluation_gates(batch) as routing:
                names = [f"{task}/{sample.id}" for task, sample in items]
                with accelerator.autocast():
                    answers = generate(method.vlm, batch, settings, names)
        routes: Sequence[tuple[str, ...] | None] = [None] * len(items) if routing is None else routing.chosen
        yield [
            Prediction(task=task, id=sample.id, text=answer.text, route=route, cut=answer.cut)
            for (task, sample), answer, route in zip(items, answers, routes, strict=True)
        ]


def score(tasks: Sequence[Task], predictions: Sequence[Prediction]) -> Evaluation:
    """Points and well-formed shares by task; `predictions` come back in the order of the tasks' test sets."""
    said = {(prediction.task, prediction.id): prediction for prediction in predictions}
    points: dict[str, float] = {}
    well_formed: dict[str, float] = {}
    cut: dict[str, int] = {}
    ordered: list[Prediction] = []
    for task in tasks:
        own = [said[task.name, sample.id] for sample in task.test]
        texts = [prediction.text for prediction in own]
        metric = METRICS[task.metric]
        points[task.name] = metric.evaluate(texts, task.test)
        well_formed[task.name] = metric.well_formed_share(texts, task.test)
        cut[task.name] = sum(prediction.cut for prediction in own)
        ordered += own
    return Evaluation(points=points, well_formed=well_formed, cut=cut, predictions=tuple(ordered))


def evaluate(
    method: Method,
    tasks: Sequence[Task],
    queue: Sequence[Sequence[tuple[str, Sample]]],
    settings: EvaluationSettings,
    accelerator: Accelerator,
    *,
    profile: Profile,
    after_batch: Callable[[int], None] = lambda samples: None,
) -> Evaluation:
    """Generate for the whole queue and score `tasks`, calling `after_batch(samples)` after each batch.

    Several processes share the batches. Over a sharded base each computes all of them, because generation ends after a
    number of forward passes that depends on the answers, and a forward pass needs every process.
    """
    number, processes = process()
    split = processes > 1 and not is_sharded(method.vlm.model)
    predictions: list[Prediction] = []
    for answered in predict(
        method, queue[number::processes] if split else queue, settings, accelerator, profile=profile
    ):
        predictions += answered
        after_batch(len(answered))
    if split:
        own = len(predictions)
        predictions = gathered(predictions)
        after_batch(len(predictions) - own)
    with profile.part("evaluation_score"):
        return score(tasks, predictions)
