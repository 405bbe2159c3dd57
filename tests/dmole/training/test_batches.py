# SPDX-License-Identifier: Apache-2.0
"""Which samples a step sees: by (seed, stage, epoch) alone, each once an epoch, however many processes share it."""

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dmole.data.collate import Batch, collate
from dmole.data.images import ImageError
from dmole.data.sample import Stream
from dmole.models.vision_language import VisionLanguageModel
from dmole.training.batches import Piece, load, permutation, pieces_of, steps_per_epoch, windows
from dmole.training.settings import TrainingSettings


def places(settings: TrainingSettings, count: int, steps: int, *, first: int = 0, process: int = 0, processes: int = 1,
           seed: int = 1, stage: int = 2) -> list[list[Piece]]:  # fmt: skip
    made = windows(
        settings, count, seed=seed, stage=stage, first=first, total=steps, process=process, processes=processes
    )
    return list(made)


def test_permutations_follow_from_seed_stage_and_epoch_alone() -> None:
    order = permutation(50, seed=1, stage=2, epoch=0)
    assert sorted(order) == list(range(50))
    torch.manual_seed(99)
    assert permutation(50, seed=1, stage=2, epoch=0) == order
    grid = [(seed, stage, epoch) for seed in range(3) for stage in range(1, 4) for epoch in range(3)]
    orders = {tuple(permutation(50, seed=s, stage=t, epoch=e)) for s, t, e in grid}
    assert len(orders) == len(grid)


def test_seed_0_in_epoch_1_reads_in_another_order_than_seed_1_in_epoch_0() -> None:
    assert permutation(50, seed=0, stage=1, epoch=1) != permutation(50, seed=1, stage=1, epoch=0)


def test_every_epoch_reads_every_sample_once() -> None:
    settings = TrainingSettings(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert steps_per_epoch(settings, 10, 1) == 3
    steps = places(settings, 10, 6)
    assert [[len(piece.places) for piece in step] for step in steps] == [[2, 2], [2, 2], [2]] * 2
    for epoch in (steps[:3], steps[3:]):
        assert sorted(place for step in epoch for piece in step for place in piece.places) == list(range(10))
    assert steps[0] != steps[3]


def test_a_resumed_stage_reads_what_the_whole_one_reads() -> None:
    settings = TrainingSettings(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    whole = places(settings, 10, 6)
    assert [places(settings, 10, 6, first=first) for first in range(6)] == [whole[first:] for first in range(6)]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_window_of_one(processes: int) -> None:
    shared = TrainingSettings(per_device_train_batch_size=2)
    alone = TrainingSettings(per_device_train_batch_size=2, gradient_accumulation_steps=processes)
    expected = places(alone, 10, 5)
    by_process = [places(shared, 10, 5, process=process, processes=processes) for process in range(processes)]
    for step, window in enumerate(expected):
        pieces = [piece for own in by_process for piece in own[step]]
        counted = sorted(place for piece in pieces if piece.counts for place in piece.places)
        assert counted == sorted(place for piece in window for place in piece.places)
        # Collectives need as many forward passes of each.
        assert len({len(own[step]) for own in by_process}) == 1


def test_a_process_without_samples_keeps_pace() -> None:
    assert pieces_of([7, 8, 9], 2, process=0, processes=4) == [Piece((7, 8))]
    assert pieces_of([7, 8, 9], 2, process=1, processes=4) == [Piece((9,))]
    assert pieces_of([7, 8, 9], 2, process=3, processes=4) == [Piece((7,), counts=False)]


STEPS = [[Piece((0, 3)), Piece((5,))], [Piece((1, 2, 9))], [Piece((4, 4), counts=False)]]


def assert_same(one: Batch, two: Batch) -> None:
    assert one.samples == two.samples
    assert one.units == two.units and torch.equal(one.labels, two.labels)
    assert one.encoded.inputs.keys() == two.encoded.inputs.keys()
    for name, value in one.encoded.inputs.items():
        assert torch.equal(value, two.encoded.inputs[name])


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_made_ahead_are_the_same_and_draw_nothing(
    workers: int, toy_stream: Stream, tiny_model: VisionLanguageModel
) -> None:
    samples = toy_stream.tasks[0].train
    before = torch.get_rng_state()
    found = list(load(tiny_model, samples, iter(STEPS), workers=workers))
    assert torch.equal(torch.get_rng_state(), before)
    assert [[piece for piece, _ in step] for step in found] == STEPS
    for piece, batch in (pair for step in found for pair in step):
        assert_same(batch, collate(tiny_model, [samples[place] for place in piece.places], with_answers=True))


def test_one_step_at_most_is_prepared_ahead(toy_stream: Stream, tiny_model: VisionLanguageModel) -> None:
    asked = []

    def steps() -> Iterator[list[Piece]]:
        for place in range(10):
            asked.append(place)
            yield [Piece((place,))]

    coming = load(tiny_model, toy_stream.tasks[0].train, steps(), workers=0)
    assert asked == []
    for step in range(4):
        next(coming)
        assert asked == list(range(step + 2))
    before = threading.active_count()
    coming.close()
    assert threading.active_count() == before - 1


def test_the_thread_shares_no_tokenizer_with_the_step(toy_stream: Stream, tiny_model: VisionLanguageModel) -> None:
    """A fast tokenizer keeps its padding as state, which a method may change while the next step is prepared."""
    samples = toy_stream.tasks[2].train
    steps = [[Piece(tuple(range(number, number + 3)))] for number in range(7)] * 6
    expected = [collate(tiny_model, [samples[i] for i in step[0].places], with_answers=True) for step in steps]
    coming = load(tiny_model, samples, steps, workers=0)
    for batch in expected:
        for _ in range(20):
            tiny_model.processor.tokenizer(["a", "red green"], padding="max_length", max_length=40, padding_side="left")
            tiny_model.processor.tokenizer(["a red green"], truncation=True, max_length=2)
        assert_same(next(coming)[0][1], batch)
    assert tiny_model.reader.processor.tokenizer is not tiny_model.processor.tokenizer


def test_an_image_that_cannot_be_read_fails_in_its_own_step(
    toy_stream: Stream, tiny_model: VisionLanguageModel, tmp_path: Path
) -> None:
    samples = list(toy_stream.tasks[0].train)
    samples[2] = dataclasses.replace(samples[2], images=(tmp_path / "gone.png",))
    coming = load(tiny_model, samples, ([Piece((place,))] for place in range(4)), workers=0)
    assert [next(coming)[0][0].places for _ in range(2)] == [(0,), (1,)]
    with pytest.raises(ImageError, match="gone.png is missing"):
        next(coming)


def test_a_processor_that_sets_threads_for_itself_leaves_those_of_the_step(
    toy_stream: Stream, tiny_model: VisionLanguageModel
) -> None:
    """As the mini model's does for features that are not cached yet. A sum's bits depend on the number of threads."""
    before = torch.get_num_threads()
    set_to, inside = [], threading.Event()

    class Setting(type(tiny_model.processor)):  # type: ignore[misc]
        def __call__(self, *given: Any, **named: Any) -> Any:
            torch.set_num_threads(1)
            set_to.append(torch.get_num_threads())
            inside.set()
            return super().__call__(*given, **named)

    seen = []

    def train() -> None:
        # A thread that has not asked for its number yet, as the main one at the start of a resumed stage.
        torch.set_num_threads(3)
        coming = load(tiny_model, toy_stream.tasks[0].train, [[Piece((0,))], [Piece((1,))]], workers=0)
        next(coming)
        inside.wait()
        seen.append(torch.get_num_threads())
        coming.close()

    tiny_model.processor.__class__ = Setting
    try:
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert set_to and set(set_to) == {1} and seen == [3]


def test_a_processor_that_cannot_be_copied_is_named(toy_stream: Stream, tiny_model: VisionLanguageModel) -> None:
    tiny_model.processor.lock = threading.Lock()
    expected = "cannot be copied .*lock.*; expected a copy .* Set training.dataloader_num_workers to 1"
    with pytest.raises(ValueError, match=expected):
        next(load(tiny_model, toy_stream.tasks[0].train, [[Piece((0,))]], workers=0))
