# SPDX-License-Identifier: Apache-2.0
"""Samples -> one padded batch: right-padded with labels for training, left-padded without answers for generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmole.data.sample import Sample
from dmole.models.multimodal import MultimodalModel

IGNORE = -100  # cross-entropy's ignore_index


@dataclass(frozen=True)
class Batch:
    """Shapes: ``input_ids``, ``attention_mask``, ``labels`` [B, T] int64; ``pixel_values`` [B, C, H, W] float32.

    ``labels`` is -100 outside the answer (and everywhere when the batch was made for generation).
    """

    samples: tuple[Sample, ...]
    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor
    labels: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with its tensors on `device`."""
        names = ("input_ids", "attention_mask", "pixel_values", "labels")
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names}
        return dataclasses.replace(self, **moved)


def collate(model: MultimodalModel, samples: Sequence[Sample], *, with_answers: bool) -> Batch:
    """``with_answers``: prompt + ``answers[0]``, right-padded, labels on it. Else the prompt, left-padded."""
    prompts = [model.prompt_ids(sample.instruction) for sample in samples]
    answers = [model.answer_ids(sample.answers[0]) if with_answers else [] for sample in samples]
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(lengths)
    input_ids = torch.full((len(prompts), width), int(model.tokenizer.pad_token_id or 0), device="cpu")
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE)
    for row, (prompt, answer, length) in enumerate(zip(prompts, answers, lengths, strict=True)):
        start = 0 if with_answers else width - length
        input_ids[row, start : start + length] = torch.tensor(prompt + answer, device="cpu")
        attention_mask[row, start : start + length] = 1
        labels[row, start + len(prompt) : start + length] = torch.tensor(answer, dtype=torch.long, device="cpu")
    return Batch(
        samples=tuple(samples),
        input_ids=input_ids,
        attention_mask=attention_mask,
        pixel_values=model.pixel_values([sample.image for sample in samples]),
        labels=labels,
    )
