# SPDX-License-Identifier: Apache-2.0
"""Pretrains the mini benchmark's base model on the corpus: ``python -m mini_cmit.pretraining --help``.

Every image carries several turns, so one pass of the vision tower teaches several answers:

    <bos> <image> x n  <user> q1 <assistant> a1 <eos>  <user> q2 <assistant> a2 <eos>  ...        loss on a_i and <eos>

Beside it, the image's tokens v_t alone have to name what the open answers speak of, a bag of words:

    - mean over answer tokens w of  log softmax_w( logsumexp_t H v_t )        H a head of its own    times `bag_weight`

The vision tower first trains on that alone (`vision_share` of the time), at several times the speed of the whole model.
Without it both towers start blind: 24,000 images brought the answers no further than the words' frequencies.

Every step of the whole model also reads a batch of scenes told in words (`mini_cmit.pretraining.told`), whose text
stands where the image's tokens stand.

Turns are shuffled anew each epoch, so each of them is often the first, which is the form of the benchmark.

Data parallel over processes of one thread each (gloo, one all-reduce of the flattened gradient a step): on a few CPU
cores this beats one process of several threads, whose every operation would wait for the slowest thread. Batches hold
sequences of about one length; what is padded is computed for nothing.
"""

from __future__ import annotations

import csv
import json
import math
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as F
from transformers import SiglipVisionConfig

from dmole.data.collate import IGNORE
from dmole.models.multimodal import MultimodalModel, load_model
from mini_cmit.model.architecture import build_mini_network, train_tokenizer
from mini_cmit.model.image_processing import MiniImageProcessor
from mini_cmit.model.processing import CHAT_TEMPLATE, MiniProcessor
from mini_cmit.pretraining.batches import Batch, PretrainingData
from mini_cmit.pretraining.corpus import Shard, read_shard
from mini_cmit.pretraining.scene import SIDE, Turn


@dataclass(frozen=True, kw_only=True)
class PretrainingSettings:
    """The recipe of the shipped weights."""

    seed: int = 0
    epochs: float = 3.0
    batch_size: int = 24  # images a process
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup_share: float = 0.03
    clip: float = 1.0
    bag_weight: float = 0.3
    vision_share: float = 0.15  # of the run, the vision tower alone
    told_share: float = 0.15  # of the run, the language model alone on scenes told in words
    vision_batch_size: int = 64  # images a process
    turns: int = 4  # asked of an image in one pass
    told_batch_size: int = 24  # scenes told in words a step and process
    vocabulary: int = 2048
    held_out: int = 64  # images a family
    bfloat16: bool = True
    max_seconds: float = math.inf
    start_from: str = ""  # a saved model whose weights and tokenizer this run goes on with


def channel_statistics(shards: Sequence[Shard], images: int = 256) -> tuple[Tensor, Tensor]:
    """Mean and deviation [C] of the stem's channels over the first images of every shard, families weighing alike."""
    sample = np.concatenate([shard.features[:images].astype(np.float32) for shard in shards])
    deviation = sample.std(axis=(0, 2, 3))
    return torch.from_numpy(sample.mean(axis=(0, 2, 3))), torch.from_numpy(deviation).clamp_min(1e-2)


class Pretraining:
    """One process of a run: ``Pretraining(corpus, families, settings).run(output)``; ``rank`` of ``processes``."""

    def __init__(
        self, corpus: Path, families: Sequence[str], settings: PretrainingSettings, *, rank: int = 0, processes: int = 1
    ):
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.rank = rank
        self.processes = processes
        self.shards = [read_shard(corpus, family) for family in families]
        self.mm = load_model(settings.start_from) if settings.start_from else self._new_model()
        self.network = self.mm.model.requires_grad_(True).train()
        # On a CPU in bfloat16 the backward of the flash kernel takes a quarter of a step; plain products are 1.5 times
        # as fast over the whole step (24 sequences of 115 tokens, one thread).
        self.network.set_attn_implementation("eager")
        vision = cast(SiglipVisionConfig, self.network.config.vision_config)
        self.bag_head = torch.nn.Linear(vision.hidden_size, len(self.mm.tokenizer))
        self._log: list[dict[str, float | str]] = []
        self._told_losses: list[float] = []
        self.data = PretrainingData(
            self.shards,
            self.mm,
            seed=settings.seed,
            turns=settings.turns,
            held_out=settings.held_out,
            rank=rank,
            processes=processes,
        )

    def _new_model(self) -> MultimodalModel:
        texts = (t for shard in self.shards for turns in shard.turns for turn in turns for t in _texts(turn))
        tokenizer = train_tokenizer(texts, self.settings.vocabulary)
        mean, deviation = channel_statistics(self.shards)
        processor = MiniProcessor(  # type: ignore[no-untyped-call]
            image_processor=MiniImageProcessor(
                size={"height": SIDE, "width": SIDE}, image_mean=_shortest(mean), image_std=_shortest(deviation)
            ),
            tokenizer=tokenizer,
            patch_size=1,
            vision_feature_select_strategy="full",
            chat_template=CHAT_TEMPLATE,
        )
        return MultimodalModel(build_mini_network(tokenizer, SIDE), processor)

    def run(self, output: Path) -> None:
        """Trains, writes ``output`` (model) and ``output/pretraining.csv`` (the log) with the recipe beside it."""
        s = self.settings
        passes = len(self.data.examples) * s.epochs
        if s.vision_share > 0:
            self._phase("vision", output, s.vision_batch_size, passes, s.max_seconds * s.vision_share)
        if s.told_share > 0:
            self._phase("told", output, s.told_batch_size, passes, s.max_seconds * s.told_share)
        self._phase("answers", output, s.batch_size, passes, s.max_seconds * (1 - s.vision_share - s.told_share))

    def _phase(self, phase: str, output: Path, batch_size: int, passes: float, max_seconds: float) -> None:
        """One warm-up and cosine, over ``passes`` images or ``max_seconds``, whichever ends first."""
        s = self.settings
        # Both ranks drew the same weights: seeded alike.
        images_a_step = batch_size * self.processes
        steps = int(passes / images_a_step)
        trained = [*self.network.parameters(), *self.bag_head.parameters()]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": s.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=s.learning_rate, betas=(0.9, 0.98), fused=True)
        loss_of = {"vision": self._bag_loss, "told": lambda _: self._told_loss(), "answers": self._answers_loss}[phase]
        started = time.monotonic()
        window: list[float] = []
        batches: Iterator[Any] = (
            repeat(None) if phase == "told" else self.data.batches(batch_size, texts=phase == "answers")
        )
        progress = 0.0
        step = 0
        while progress < 1.0:
            # The cosine follows whichever limit is nearer, steps or seconds, so that it always reaches its end.
            progress = self._from_first(max(step / steps, (time.monotonic() - started) / max_seconds))
            for group in optimizer.param_groups:
                group["lr"] = s.learning_rate * _schedule(min(progress, 1.0), s.warmup_share)
            loss = loss_of(next(batches))
            torch.autograd.backward(loss)
            self._average_gradients(trained)
            torch.nn.utils.clip_grad_norm_(trained, s.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            window.append(float(loss.detach()))
            step += 1
            if self.rank == 0 and (step % 50 == 0 or progress >= 1.0):
                row: dict[str, float | str] = {
                    "phase": phase,
                    "step": step,
                    "images": step * images_a_step,
                    "seconds": round(time.monotonic() - started, 1),
                    "loss": round(sum(window) / len(window), 4),
                }
                if self._told_losses:
                    row["loss_told"] = round(sum(self._told_losses) / len(self._told_losses), 4)
                window, self._told_losses = [], []
                if phase == "answers" and (step % 250 == 0 or progress >= 1.0):
                    row |= {f"accuracy_{sh.family}": a for sh, a in zip(self.shards, self.accuracies(), strict=True)}
                    self._save(output)
                self._log.append(row)
                print(json.dumps(row), flush=True)
                _write_log(output / "pretraining.csv", self._log)
        if self.rank == 0 and phase != "answers":
            self._save(output)

    def _from_first(self, value: float) -> float:
        """Rank 0's value, on every rank."""
        if self.processes == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(shared, 0)
        return float(shared)

    def _average_gradients(self, trained: Sequence[torch.nn.Parameter]) -> None:
        if self.processes == 1:
            return
        gradients = [p.grad for p in trained if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.processes
        for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _save(self, output: Path) -> None:
        self.mm.save(output)
        # transformers reads this key and does not write it. On a CPU the backward of the flash kernel costs a quarter
        # of a step on sequences this short; on a GPU either does.
        config = json.loads((output / "config.json").read_text())
        text = json.dumps({"attn_implementation": "eager", **config}, indent=2)
        (output / "config.json").write_text(text + "\n")
        # The name alone of what it went on from: a path means nothing on another machine.
        recipe = asdict(self.settings) | {"start_from": Path(self.settings.start_from).name}
        (output / "pretraining.json").write_text(json.dumps(recipe, indent=2) + "\n")

    def accuracies(self) -> list[float]:
        """Per family: share of held-out answers whose every token is the most likely one (teacher forcing)."""
        self.network.eval()
        result = []
        with torch.inference_mode():
            for examples in self.data.held_out:
                right = total = 0
                batch = self.data.assemble(examples, random.Random(0))
                predicted = self._forward(batch).argmax(-1)
                for row, spans in enumerate(batch.spans):
                    for start, stop in spans:
                        total += 1
                        right += bool((predicted[row, start - 1 : stop - 1] == batch.ids_BT[row, start:stop]).all())
                result.append(round(right / total, 4))
        self.network.train()
        return result

    def _hidden(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Last hidden states [B, T, D] of the language model and [B, N, D'] of the vision tower.

        No attention mask: padding is on the right and attention is causal, so no real token sees any.
        """
        model, tokens = self.network.model, self.mm.image_tokens
        seen = model.get_image_features(pixel_values=batch.pixels)
        image_BND = torch.stack(tuple(seen.pooler_output))
        words = model.get_input_embeddings()(batch.ids_BT)
        # <bos>, the image, the turns: where the image's placeholders are is known.
        embedded = torch.cat([words[:, :1], image_BND.to(words.dtype), words[:, 1 + tokens :]], dim=1)
        read = model.language_model(inputs_embeds=embedded, use_cache=False)
        return read.last_hidden_state, seen.last_hidden_state

    def _forward(self, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bfloat16):
            return cast(Tensor, self.network.lm_head(self._hidden(batch)[0]))

    def _answers_loss(self, batch: Batch) -> Tensor:
        return self._loss(batch) + self._told_loss()

    def _told_loss(self) -> Tensor:
        ids_BT, labels_BT = self.data.told(self.settings.told_batch_size)
        targets = labels_BT[:, 1:]
        answered = targets != IGNORE
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bfloat16):
            hidden = self.network.model.language_model(input_ids=ids_BT, use_cache=False).last_hidden_state
            logits = self.network.lm_head(hidden[:, :-1][answered])
        loss = F.cross_entropy(logits.float(), targets[answered])
        self._told_losses.append(float(loss.detach()))
        return loss

    def _loss(self, batch: Batch) -> Tensor:
        targets = batch.labels_BT[:, 1:]
        answered = targets != IGNORE
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bfloat16):
            hidden, seen_BND = self._hidden(batch)
            # The head runs where there is something to predict: one position in eight.
            logits = self.network.lm_head(hidden[:, :-1][answered])
            named_BNV = self.bag_head(seen_BND)
        answers = F.cross_entropy(logits.float(), targets[answered])
        return answers + self.settings.bag_weight * _bag_entropy(named_BNV, batch.bag_BV)

    def _bag_loss(self, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bfloat16):
            named_BNV = self.bag_head(self.mm.vision_features(batch.pixels))
        return _bag_entropy(named_BNV, batch.bag_BV)


def _bag_entropy(named_BNV: Tensor, bag_BV: Tensor) -> Tensor:
    return -(bag_BV * named_BNV.float().logsumexp(1).log_softmax(-1)).sum(1).mean()


def _shortest(numbers: Tensor) -> list[float]:
    """The shortest decimals that float32 reads back as the same numbers: half the size in JSON."""
    return [float(str(number)) for number in numbers.numpy()]


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


def _process(
    rank: int,
    processes: int,
    store: str,
    corpus: Path,
    families: Sequence[str],
    settings: PretrainingSettings,
    output: Path,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    try:
        Pretraining(corpus, families, settings, rank=rank, processes=processes).run(output)
    finally:
        dist.destroy_process_group()


def pretrain(
    corpus: Path, families: Sequence[str], settings: PretrainingSettings, output: Path, *, processes: int = 2
) -> None:
    """Trains on ``processes`` processes and writes the model, its log and its recipe into ``output``."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (processes, str(Path(folder) / "store"), corpus, tuple(families), settings, output)
        mp.spawn(_process, arguments, nprocs=processes)  # type: ignore[attr-defined, no-untyped-call]
