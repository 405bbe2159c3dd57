# SPDX-License-Identifier: Apache-2.0
"""All test sets in one queue of generation batches, scored task by task: a row of the matrix A[t][i].

A batch mixes samples of different tasks, as a server would meet them: whoever routes per batch instead of per sample
loses points here. Within windows of a few batches the queue is sorted by prompt length, which spares padding.

Generation is greedy with a KV cache, in a loop of our own that does nothing else: 64 prompts and 16 new tokens take
1.05 s on the mini model with one thread, of which 0.70 s are the prompts; transformers' `generate` takes 1.18 s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dmole.config import EvaluationSettings
from dmole.data.collate import Batch, collate
from dmole.data.sample import Sample, Task
from dmole.methods.base import Method
from dmole.metrics import METRICS
from dmole.processes import gathered, is_sharded, process
from dmole.seeding import derived_generator
from dmole.training import Profile

if TYPE_CHECKING:
    from dmole.models.multimodal import MultimodalModel

SORTING_WINDOW = 4  # batches


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A raw answer. `route` names the experts' tasks, best first; () is the base model, None an unrouted method."""

    task: str
    id: str
    text: str
    route: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One row: points per task, share of well-formed answers per task, and everything that was said."""

    points: dict[str, float]
    well_formed: dict[str, float]
    predictions: tuple[Prediction, ...]


def generation_queue(mm: MultimodalModel, tasks: Sequence[Task], batch_size: int) -> list[list[tuple[str, Sample]]]:
    """Every test sample once, as batches of (task name, sample); the same for every method and stage.

    >>> # tasks of 4 and 2 samples, batch_size 3 -> e.g. [[a2, b1, a4], [b2, a1, a3]]
    """
    items = [(task.name, sample) for task in tasks for sample in task.test]
    order = torch.randperm(
        len(items), generator=derived_generator("generation queue", len(items)), device="cpu"
    ).tolist()
    lengths = [len(mm.prompt_ids(sample.instruction)) for _, sample in items]
    window = batch_size * SORTING_WINDOW
    batches: list[list[tuple[str, Sample]]] = []
    for start in range(0, len(order), window):
        chosen = sorted(order[start : start + window], key=lambda index: lengths[index])
        batches += [
            [items[index] for index in chosen[at : at + batch_size]] for at in range(0, len(chosen), batch_size)
        ]
    return batches


@torch.inference_mode()
def generate(mm: MultimodalModel, batch: Batch, *, max_new_tokens: int) -> list[str]:
    """The greedy answer to each left-padded prompt of `batch`, without its end token.

    Stops when every row has ended or after `max_new_tokens` tokens. Rows that have ended go on with padding.
    """
    model, end, pad = mm.model, int(mm.tokenizer.eos_token_id), int(mm.tokenizer.pad_token_id)
    rows = batch.input_ids.shape[0]
    mask = torch.cat([batch.attention_mask, batch.attention_mask.new_ones(rows, max_new_tokens)], dim=1)
    width = batch.input_ids.shape[1]
    # A row's first real token has position 0, as in training, where padding is on the right.
    positions = (batch.attention_mask.cumsum(dim=1) - 1).clamp_(min=0)
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        pixel_values=batch.pixel_values,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
    )
    positions = positions[:, -1:]
    ended = torch.zeros(rows, dtype=torch.bool, device=output.logits.device)
    tokens: list[Tensor] = []
    for step in range(1, max_new_tokens + 1):
        token = output.logits[:, -1].argmax(dim=-1).masked_fill_(ended, pad)
        tokens.append(token)
        ended |= token == end
        if step == max_new_tokens or bool(ended.all()):
            break
        positions = positions + 1
        output = model(
            input_ids=token[:, None],
            attention_mask=mask[:, : width + step],
            position_ids=positions,
            past_key_values=output.past_key_values,
            use_cache=True,
            logits_to_keep=1,
        )
    return [mm.decode(row) for row in torch.stack(tokens, dim=1).tolist()]


def predict(
    method: Method, queue: Sequence[Sequence[tuple[str, Sample]]], settings: EvaluationSettings, *, profile: Profile
) -> Iterator[list[Prediction]]:
    """The predictions of each batch of the queue, in order."""
    method.mm.model.train(False)
    for items in queue:
        with torch.inference_mode():
            with profile.part("evaluation_data"):
                batch = collate(method.mm, [sample for _, sample in items], with_answers=False)
                batch = batch.to(method.mm.model.device)
            with profile.part("evaluation_generate"), method.evaluation_gates(batch) as routing:
                with torch.autocast(method.mm.model.device.type, torch.bfloat16, enabled=settings.bf16):
                    answers = generate(method.mm, batch, max_new_tokens=settings.max_new_tokens)
        routes: Sequence[tuple[str, ...] | None] = [None] * len(items) if routing is None else routing.chosen
        yield [
            Prediction(task=task, id=sample.id, text=answer, route=route)
            for (task, sample), answer, route in zip(items, answers, routes, strict=True)
        ]


def score(tasks: Sequence[Task], predictions: Sequence[Prediction]) -> Evaluation:
    """Points and well-formed shares by task; `predictions` come back in the order of the tasks' test sets."""
    said = {(prediction.task, prediction.id): prediction for prediction in predictions}
    points: dict[str, float] = {}
    well_formed: dict[str, float] = {}
    ordered: list[Prediction] = []
    for task in tasks:
        own = [said[task.name, sample.id] for sample in task.test]
        texts = [prediction.text for prediction in own]
        metric = METRICS[task.metric]
        points[task.name] = metric.evaluate(texts, task.test)
        well_formed[task.name] = metric.well_formed_share(texts, task.test)
        ordered += own
    return Evaluation(points=points, well_formed=well_formed, predictions=tuple(ordered))


def evaluate(
    method: Method,
    tasks: Sequence[Task],
    queue: Sequence[Sequence[tuple[str, Sample]]],
    settings: EvaluationSettings,
    *,
    profile: Profile,
    after_batch: Callable[[int], None] = lambda samples: None,
) -> Evaluation:
    """Generate for the whole queue and score `tasks`, calling `after_batch(samples)` after each batch.

    Several processes share the batches. Over a sharded base each computes all of them, because generation ends after a
    number of forward passes that depends on the answers, and a forward pass needs every process.
    """
    number, processes = process()
    split = processes > 1 and not is_sharded(method.mm.model)
    predictions: list[Prediction] = []
    for answered in predict(method, queue[number::processes] if split else queue, settings, profile=profile):
        predictions += answered
        after_batch(len(answered))
    if split:
        own = len(predictions)
        predictions = gathered(predictions)
        after_batch(len(predictions) - own)
    with profile.part("evaluation_score"):
        return score(tasks, predictions)
