# SPDX-License-Identifier: Apache-2.0
"""Which samples each process sees in which step, and the batches made of them.

    step's window = the next  per_device_train_batch_size * gradient_accumulation_steps * processes  samples
                    of the epoch's permutation, cut into batches:   window = [b0 | b1 | b2 | b3]
    process r of P takes batches r, r + P, r + 2 P ...

A permutation follows from (seed, stage, epoch) alone, so a window is the same however many processes share it. Where
the last window of an epoch is too short for all processes, one without samples computes a copy that does not count:
collectives (a sharded base, a sum of gradients) need every process in every forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Dataset

from dmole.data.collate import IGNORE, Batch, collate, encoded
from dmole.seeding import derived_generator
from dmole.training.settings import TrainingSettings

if TYPE_CHECKING:
    from dmole.data.sample import Sample
    from dmole.models.prompts import Encoded
    from dmole.models.vision_language import VisionLanguageModel


def permutation(count: int, *, seed: int, stage: int, epoch: int) -> list[int]:
    """The order in which an epoch reads its samples; it depends on (seed, stage, epoch) alone.

    Named by words, not by a sum of numbers: seed 0 in epoch 1 reads in another order than seed 1 in epoch 0.
    """
    generator = derived_generator(seed, "order", stage, epoch)
    order: list[int] = torch.randperm(count, generator=generator, device="cpu").tolist()
    return order


def samples_per_step(settings: TrainingSettings, processes: int) -> int:
    """How many samples an optimizer step sees; the last one of an epoch may see fewer."""
    return settings.per_device_train_batch_size * settings.gradient_accumulation_steps * processes


def steps_per_epoch(settings: TrainingSettings, count: int, processes: int) -> int:
    """Optimizer steps in one pass over `count` samples."""
    return math.ceil(count / samples_per_step(settings, processes))


@dataclass(frozen=True)
class Piece:
    """Places of the samples of one batch of one process. `counts` is False for a copy that only keeps pace."""

    places: tuple[int, ...]
    counts: bool = True


def pieces_of(window: Sequence[int], batch_size: int, *, process: int, processes: int) -> list[Piece]:
    """What process number `process` computes of a step's window; as many pieces for every process.

    >>> pieces_of([4, 0, 3, 1, 2], 2, process=0, processes=2)
    [Piece(places=(4, 0), counts=True), Piece(places=(2,), counts=True)]
    >>> pieces_of([4, 0, 3, 1, 2], 2, process=1, processes=2)
    [Piece(places=(3, 1), counts=True), Piece(places=(4,), counts=False)]
    """
    cut = [tuple(window[start : start + batch_size]) for start in range(0, len(window), batch_size)]
    rounds = math.ceil(len(cut) / processes)
    idle = Piece((window[0],), counts=False)
    places = range(process, rounds * processes, processes)
    return [Piece(cut[place]) if place < len(cut) else idle for place in places]


def windows(
    settings: TrainingSettings,
    count: int,
    *,
    seed: int,
    stage: int,
    first: int,
    total: int,
    process: int,
    processes: int,
) -> Iterator[list[Piece]]:
    """The pieces of steps `first` .. `total` - 1 for one process."""
    size, per_epoch = samples_per_step(settings, processes), steps_per_epoch(settings, count, processes)
    order: list[int] = []
    for step in range(first, total):
        epoch, place = divmod(step, per_epoch)
        if not order or place == 0:
            order = permutation(count, seed=seed, stage=stage, epoch=epoch)
        window = order[place * size : (place + 1) * size]
        yield pieces_of(window, settings.per_device_train_batch_size, process=process, processes=processes)


class _Samples(Dataset["Sample"]):
    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: int) -> Sample:
        return self.samples[place]


def load(
    vlm: VisionLanguageModel, samples: Sequence[Sample], steps: Iterable[list[Piece]], *, workers: int
) -> Generator[list[tuple[Piece, Batch]], None, None]:
    """The pieces of each step with their batches, with answers, on the CPU.

    workers: 0 prepares the next step in a thread while the caller computes this one; otherwise so many processes work
        ahead. Nothing drawn at random is involved, so the batches are the same either way.
    """
    if workers == 0:
        yield from _one_step_ahead(vlm, samples, steps)
        return
    every = list(steps)
    loader = DataLoader(
        _Samples(samples),
        batch_sampler=[list(piece.places) for step in every for piece in step],
        num_workers=workers,
        collate_fn=_Collating(vlm),
        # Its own: a loader draws a seed when it starts, and dropout draws from the global generator.
        generator=torch.Generator(device="cpu").manual_seed(0),
    )
    ahead = iter(loader)
    for step in every:
        yield [(piece, next(ahead)) for piece in step]


def _one_step_ahead(
    vlm: VisionLanguageModel, samples: Sequence[Sample], steps: Iterable[list[Piece]]
) -> Generator[list[tuple[Piece, Batch]], None, None]:
    reader = vlm.reader

    def prepared(step: list[Piece]) -> list[tuple[Piece, tuple[Sample, ...], Encoded]]:
        chosen = [(piece, tuple(samples[place] for place in piece.places)) for piece in step]
        return [(piece, some, encoded(reader, some, with_answers=True)) for piece, some in chosen]

    def finished(step: list[tuple[Piece, tuple[Sample, ...], Encoded]]) -> list[tuple[Piece, Batch]]:
        # Here, not in the thread: measuring a tower's rows calls the model, which is computing there.
        return [(piece, Batch(samples=some, encoded=own, units=vlm.units(own))) for piece, some, own in step]

    # A Python thread takes the number of torch's threads that was last set anywhere, when it first asks, and keeps it:
    # an image processor that sets one for itself in the thread must not set this one's.
    torch.get_num_threads()
    coming: Future[list[tuple[Piece, tuple[Sample, ...], Encoded]]] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        for step in steps:
            ready, coming = coming, thread.submit(prepared, step)
            if ready is not None:
                yield finished(ready.result())
        if coming is not None:
            yield finished(coming.result())


class _Collating:
    def __init__(self, vlm: VisionLanguageModel) -> None:
        self.vlm = vlm

    def __call__(self, samples: list[Sample]) -> Batch:
        return collate(self.vlm, samples, with_answers=True)


def answer_tokens(batch: Batch) -> int:
    """Tokens over which the loss of a batch is a mean: labels that are predicted, which the first one is not."""
    return int((batch.labels[:, 1:] != IGNORE).sum())
