# SPDX-License-Identifier: Apache-2.0
"""Samples -> conversations -> one batch of tensors, with what the gates of each tower need to know about its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dmole.data.images import open_image
from dmole.data.sample import Sample
from dmole.models.chat_template import Conversation
from dmole.models.prompts import IGNORE, Encoded
from dmole.models.vision_language import VisionLanguageModel

__all__ = ["IGNORE", "Batch", "collate", "conversation", "encoded"]


@dataclass(frozen=True)
class Batch:
    """A batch of B samples as a model reads it.

    Attributes:
        encoded: everything that the processor returned, and the labels of the answers.
        units: by tower, how much of its input belongs to each sample: `units` of `dmole_kernels.ExpertGates.use`.
    """

    samples: tuple[Sample, ...]
    encoded: Encoded
    units: dict[str, list[int]]

    @property
    def input_ids(self) -> Tensor:
        """int64 [B, T]."""
        return self.encoded.inputs["input_ids"]

    @property
    def labels(self) -> Tensor:
        """int64 [B, T], -100 outside the answers. ValueError for a batch that was made for generation."""
        if self.encoded.labels is None:
            raise ValueError("labels: got a batch without answers; expected one. Collate with with_answers=True.")
        return self.encoded.labels

    def to(self, device: torch.device | str, **_: Any) -> Batch:
        """The same batch on `device`. accelerate passes `non_blocking` too."""
        return replace(self, encoded=self.encoded.to(device))


def collate(vlm: VisionLanguageModel, samples: Sequence[Sample], *, with_answers: bool) -> Batch:
    """`with_answers`: prompt and `answers[0]`, right-padded, labels on it. Else the prompt, left-padded.

    Of a conversation with several answers the last one has labels, or all where the sample's `taught` is "all".
    """
    made = encoded(vlm, samples, with_answers=with_answers)
    return Batch(samples=tuple(samples), encoded=made, units=vlm.units(made))


def encoded(vlm: VisionLanguageModel, samples: Sequence[Sample], *, with_answers: bool) -> Encoded:
    """What of a batch the processor makes: no weight of the model is read."""
    conversations = [conversation(sample, sample.answers[0] if with_answers else None) for sample in samples]
    made = vlm.encode(conversations, with_answers=with_answers)
    if made.labels is not None:
        for row, sample in enumerate(samples):
            if sample.taught == "last":
                made.labels[row, : made.prompt_lengths[row]] = IGNORE
    return made


def conversation(sample: Sample, answer: str | None, *, images: Sequence[Image.Image] | None = None) -> Conversation:
    """transformers' messages: what the sample asks, with its images in their places, then the answer if there is one.

    Args:
        images: what stands for the sample's images; None opens their files.
    """
    if images is not None and len(images) != len(sample.images):
        raise ValueError(
            f"images: got {len(images)} for the {len(sample.images)} of sample {sample.id!r}; expected all."
        )
    shown = iter([open_image(path) for path in sample.images] if images is None else images)
    messages: list[dict[str, Any]] = [
        {
            "role": turn.role,
            "content": [
                {"type": "image", "image": next(shown)} if part is None else {"type": "text", "text": part}
                for part in turn.parts
            ],
        }
        for turn in sample.asked
    ]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages
