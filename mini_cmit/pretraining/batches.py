# SPDX-License-Identifier: Apache-2.0
"""Batches of pretraining: images with their turns as padded token sequences, and scenes told in words."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from dmole.data.collate import IGNORE
from dmole.models.multimodal import MultimodalModel
from mini_cmit.model.image_processing import MiniImageProcessor
from mini_cmit.pretraining.corpus import Shard
from mini_cmit.pretraining.scene import Turn
from mini_cmit.pretraining.told import told_scene

_BUCKET = 32  # batches that are sorted by length together


@dataclass(frozen=True)
class Example:
    family: int
    index: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch; the texts are empty where only the vision tower trains."""

    pixels: Tensor
    bag_BV: Tensor
    ids_BT: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    labels_BT: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    spans: tuple[list[tuple[int, int]], ...] = ()


class PretrainingData:
    """What one process of `processes` reads, in an order that (seed, epoch) decide; `turns` asked of an image."""

    def __init__(
        self,
        shards: Sequence[Shard],
        mm: MultimodalModel,
        *,
        seed: int,
        turns: int,
        held_out: int,
        rank: int = 0,
        processes: int = 1,
    ):
        self.shards = shards
        self.held_out = [[Example(f, i) for i in range(held_out)] for f in range(len(shards))]
        self.examples = [Example(f, i) for f, s in enumerate(shards) for i in range(held_out, len(s.turns))]
        self._mm = mm
        self._images_as = cast(MiniImageProcessor, mm.processor.image_processor)
        self._seed, self._turns = seed, turns
        self._rank, self._processes = rank, processes
        self._told_rng = random.Random(f"told/{seed}/{rank}")
        self._token_ids: dict[str, list[int]] = {}
        self._prompt = mm.prompt_ids("")  # once: only its markers and the image's placeholders are used

    def batches(self, size: int, *, texts: bool) -> Iterator[Batch]:
        epoch = 0
        while True:
            rng = random.Random(f"{self._seed}/{epoch}")
            order = rng.sample(self.examples, len(self.examples))
            for start in range(0, len(order), size * _BUCKET * self._processes):
                bucket = sorted(order[start : start + size * _BUCKET * self._processes], key=self._length)
                batches = [bucket[i : i + size] for i in range(0, len(bucket) - size + 1, size)]
                # Neighbours in length go to the ranks of one step: nobody waits long for the other.
                steps = [batches[i : i + self._processes] for i in range(0, len(batches), self._processes)]
                for step in rng.sample(full := [x for x in steps if len(x) == self._processes], len(full)):
                    yield self.assemble(step[self._rank], rng) if texts else self._images(step[self._rank])
            epoch += 1

    def _length(self, example: Example) -> int:
        turns = self.shards[example.family].turns[example.index]
        return sum(3 + len(self._ids(turn.question)) + len(self._ids(turn.answer)) for turn in turns)

    def assemble(self, examples: Sequence[Example], rng: random.Random) -> Batch:
        sequences = []
        for example in examples:
            turns = self.shards[example.family].turns[example.index]
            sequences.append(self._sequence(rng.sample(turns, min(len(turns), self._turns))))
        ids_BT, labels_BT = self._padded(sequences)
        spans = tuple(spans for _, spans in sequences)
        return replace(self._images(examples), ids_BT=ids_BT, labels_BT=labels_BT, spans=spans)

    def _padded(self, sequences: Sequence[tuple[list[int], list[tuple[int, int]]]]) -> tuple[Tensor, Tensor]:
        """Token ids and labels [B, T], padded on the right; labels on the answers alone."""
        width = max(len(ids) for ids, _ in sequences)
        ids_BT = torch.full((len(sequences), width), int(self._mm.tokenizer.pad_token_id or 0))
        labels_BT = torch.full_like(ids_BT, IGNORE)
        for row, (ids, spans) in enumerate(sequences):
            ids_BT[row, : len(ids)] = torch.tensor(ids)
            for start, stop in spans:
                labels_BT[row, start:stop] = ids_BT[row, start:stop]
        return ids_BT, labels_BT

    def _images(self, examples: Sequence[Example]) -> Batch:
        raw = np.stack([self.shards[e.family].features[e.index] for e in examples]).astype(np.float32)
        return Batch(pixels=self._images_as.standardise(torch.from_numpy(raw)), bag_BV=self._bag(examples))

    def _bag(self, examples: Sequence[Example]) -> Tensor:
        """[B, V]: equal weight on every token of an image's open answers; letters and yes/no say nothing alone."""
        bag_BV = torch.zeros(len(examples), len(self._mm.tokenizer))
        for row, example in enumerate(examples):
            for turn in self.shards[example.family].turns[example.index]:
                if not turn.question.endswith("letter.") and turn.answer not in ("yes", "no"):
                    bag_BV[row, self._ids(turn.answer)] = 1.0
        return bag_BV / bag_BV.sum(1, keepdim=True).clamp_min(1.0)

    def _sequence(
        self, turns: Sequence[Turn], context: Sequence[int] | None = None
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens and the spans of the answers; ``context`` in the image's place makes it a told scene."""
        image_end = 1 + self._mm.image_tokens
        user, assistant = self._prompt[image_end], self._prompt[-1]
        ids = self._prompt[:image_end] if context is None else [self._prompt[0], *context]
        spans = []
        for turn in turns:
            ids += [user, *self._ids(turn.question), assistant]
            answer = [*self._ids(turn.answer), int(self._mm.tokenizer.eos_token_id or 0)]
            spans.append((len(ids), len(ids) + len(answer)))
            ids += answer
        return ids, spans

    def _ids(self, text: str) -> list[int]:
        if text not in self._token_ids:
            self._token_ids[text] = self._mm.text_ids(text)
        return self._token_ids[text]

    def told(self, scenes: int) -> tuple[Tensor, Tensor]:
        """Token ids and labels [B, T] of the next scenes told in words."""
        told = (told_scene(self._told_rng) for _ in range(scenes))
        return self._padded([self._sequence(s.turns, context=self._mm.text_ids(s.context)) for s in told])
