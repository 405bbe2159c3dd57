# SPDX-License-Identifier: Apache-2.0
"""Pretrains the mini benchmark's base model on the corpus: ``python -m dmole.pretraining --help``.

Every image carries several turns, so one pass of the vision tower teaches several answers:

    <bos> <image> x n  <user> q1 <assistant> a1 <eos>  <user> q2 <assistant> a2 <eos>  ...        loss on a_i and <eos>

Turns are shuffled anew each epoch, so each of them is often the first, which is the form of the benchmark.
"""

from __future__ import annotations

import csv
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dmole.models.architecture import build_mini_network, train_tokenizer
from dmole.models.multimodal import MultimodalModel, StemProcessor
from dmole.pretraining.corpus import Shard, read_shard
from dmole.pretraining.scene import SIDE, Turn

_IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class PretrainingSettings:
    """The recipe of the shipped weights."""

    seed: int = 0
    epochs: float = 3.0
    batch_size: int = 64
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warmup_share: float = 0.03
    clip: float = 1.0
    vocabulary: int = 2048
    held_out: int = 64  # images a family
    bfloat16: bool = True
    max_seconds: float = math.inf


@dataclass(frozen=True)
class _Example:
    family: int
    index: int


def channel_statistics(shards: Sequence[Shard], images: int = 256) -> tuple[Tensor, Tensor]:
    """Mean and deviation [C] of the stem's channels over the first images of every shard, families weighing alike."""
    sample = np.concatenate([shard.features[:images].astype(np.float32) for shard in shards])
    deviation = sample.std(axis=(0, 2, 3))
    return torch.from_numpy(sample.mean(axis=(0, 2, 3))), torch.from_numpy(deviation).clamp_min(1e-2)


class Pretraining:
    """One run: ``Pretraining(corpus, settings).run(output)``."""

    def __init__(self, corpus: Path, families: Sequence[str], settings: PretrainingSettings):
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.shards = [read_shard(corpus, family) for family in families]
        texts = (t for shard in self.shards for turns in shard.turns for turn in turns for t in _texts(turn))
        tokenizer = train_tokenizer(texts, settings.vocabulary)
        mean, deviation = channel_statistics(self.shards)
        network = build_mini_network(tokenizer, SIDE)
        self.mm = MultimodalModel(network, tokenizer, StemProcessor(SIDE, mean, deviation))
        self.network = network.requires_grad_(True).train()
        self._token_ids: dict[str, list[int]] = {}
        held = settings.held_out
        self.held_out = [[_Example(f, i) for i in range(held)] for f in range(len(self.shards))]
        self.examples = [_Example(f, i) for f, s in enumerate(self.shards) for i in range(held, len(s.turns))]

    def run(self, output: Path) -> None:
        """Trains, writes ``output`` (model) and ``output/pretraining.csv`` (the log) with the recipe beside it."""
        s = self.settings
        output.mkdir(parents=True, exist_ok=True)
        steps = int(len(self.examples) * s.epochs / s.batch_size)
        decay = [p for p in self.network.parameters() if p.ndim > 1]
        plain = [p for p in self.network.parameters() if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": s.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=s.learning_rate, betas=(0.9, 0.98), fused=True)
        started = time.monotonic()
        log: list[dict[str, float | str]] = []
        window: list[float] = []
        batches = self._batches()
        progress = 0.0
        step = 0
        while progress < 1.0:
            # The cosine follows whichever limit is nearer, steps or seconds, so that it always reaches its end.
            progress = max(step / steps, (time.monotonic() - started) / s.max_seconds)
            for group in optimizer.param_groups:
                group["lr"] = s.learning_rate * _schedule(min(progress, 1.0), s.warmup_share)
            loss = self._loss(next(batches))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), s.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            window.append(float(loss.detach()))
            step += 1
            if step % 100 == 0 or progress >= 1.0:
                row: dict[str, float | str] = {
                    "step": step,
                    "images": step * s.batch_size,
                    "seconds": round(time.monotonic() - started, 1),
                    "loss": round(sum(window) / len(window), 4),
                }
                window = []
                if step % 500 == 0 or progress >= 1.0:
                    row |= {f"accuracy_{sh.family}": a for sh, a in zip(self.shards, self.accuracies(), strict=True)}
                log.append(row)
                print(json.dumps(row), flush=True)
                _write_log(output / "pretraining.csv", log)
            if step % 1000 == 0:
                self._save(output)
        self._save(output)

    def _save(self, output: Path) -> None:
        self.mm.save(output)
        (output / "pretraining.json").write_text(json.dumps(asdict(self.settings), indent=2) + "\n")

    def accuracies(self) -> list[float]:
        """Per family: share of held-out answers whose every token is the most likely one (teacher forcing)."""
        self.network.eval()
        result = []
        with torch.inference_mode():
            for examples in self.held_out:
                right = total = 0
                batch = self._assemble(examples, random.Random(0))
                predicted = self._forward(batch).argmax(-1)
                for row, spans in enumerate(batch["spans"]):
                    for start, stop in spans:
                        total += 1
                        right += bool((predicted[row, start - 1 : stop - 1] == batch["ids"][row, start:stop]).all())
                result.append(round(right / total, 4))
        self.network.train()
        return result

    def _batches(self) -> Iterator[dict]:
        epoch = 0
        size = self.settings.batch_size
        while True:
            rng = random.Random(f"{self.settings.seed}/{epoch}")
            order = rng.sample(self.examples, len(self.examples))
            for start in range(0, len(order) - size + 1, size):
                yield self._assemble(order[start : start + size], rng)
            epoch += 1

    def _assemble(self, examples: Sequence[_Example], rng: random.Random) -> dict:
        sequences, spans = [], []
        for example in examples:
            ids, span = self._sequence(rng.sample(turns := self.shards[example.family].turns[example.index], len(turns)))
            sequences.append(ids)
            spans.append(span)
        width = max(map(len, sequences))
        ids_BT = torch.full((len(sequences), width), int(self.mm.tokenizer.pad_token_id or 0))
        labels_BT = torch.full_like(ids_BT, _IGNORE)
        mask_BT = torch.zeros_like(ids_BT)
        for row, (ids, span) in enumerate(zip(sequences, spans, strict=True)):
            ids_BT[row, : len(ids)] = torch.tensor(ids)
            mask_BT[row, : len(ids)] = 1
            for start, stop in span:
                labels_BT[row, start:stop] = ids_BT[row, start:stop]
        raw = np.stack([self.shards[e.family].features[e.index] for e in examples]).astype(np.float32)
        processor: StemProcessor = self.mm.pixel_values  # type: ignore[assignment]
        pixels = (torch.from_numpy(raw) - processor.mean[:, None, None]) / processor.deviation[:, None, None]
        return {"ids": ids_BT, "mask": mask_BT, "labels": labels_BT, "pixels": pixels, "spans": spans}

    def _sequence(self, turns: Sequence[Turn]) -> tuple[list[int], list[tuple[int, int]]]:
        ids = self.mm.prompt_ids("")[:-2]
        user, assistant = self.mm.prompt_ids("")[-2:]
        spans = []
        for turn in turns:
            ids += [user, *self._ids(turn.question), assistant]
            answer = [*self._ids(turn.answer), int(self.mm.tokenizer.eos_token_id or 0)]
            spans.append((len(ids), len(ids) + len(answer)))
            ids += answer
        return ids, spans

    def _ids(self, text: str) -> list[int]:
        if text not in self._token_ids:
            self._token_ids[text] = self.mm.text_ids(text)
        return self._token_ids[text]

    def _forward(self, batch: dict) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bfloat16):
            return self.network(input_ids=batch["ids"], attention_mask=batch["mask"], pixel_values=batch["pixels"]).logits

    def _loss(self, batch: dict) -> Tensor:
        logits = self._forward(batch)[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=_IGNORE)


def _texts(turn: Turn) -> tuple[str, str]:
    return f" {turn.question}", f" {turn.answer}"


def _schedule(progress: float, warmup: float) -> float:
    return min(progress / warmup + 1e-2, 1.0) * 0.5 * (1 + math.cos(math.pi * progress))


def _write_log(file: Path, rows: Sequence[dict[str, float | str]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, names)
        writer.writeheader()
        writer.writerows(rows)
