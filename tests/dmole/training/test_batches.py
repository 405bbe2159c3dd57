# SPDX-License-Identifier: Apache-2.0
"""Which samples a step sees: by (seed, stage, epoch) alone, each once an epoch, however many processes share it."""

import pytest
import torch

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


def test_workers_prepare_the_same_batches_and_draw_nothing(toy_stream: Stream, tiny_model: VisionLanguageModel) -> None:
    samples = toy_stream.tasks[0].train
    wanted = [(0, 3), (5,), (1, 2, 9)]
    plain = list(load(tiny_model, samples, wanted, workers=0))
    before = torch.get_rng_state()
    ahead = list(load(tiny_model, samples, wanted, workers=1))
    assert torch.equal(torch.get_rng_state(), before)
    for one, two in zip(plain, ahead, strict=True):
        assert one.samples == two.samples
        assert one.units == two.units and torch.equal(one.labels, two.labels)
        assert one.encoded.inputs.keys() == two.encoded.inputs.keys()
        for name, value in one.encoded.inputs.items():
            assert torch.equal(value, two.encoded.inputs[name])
