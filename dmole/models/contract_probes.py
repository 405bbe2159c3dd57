# SPDX-License-Identifier: Apache-2.0
"""What the points of the contract test share: findings, the batches they look at, what is measured on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmole.models.prompts import Encoded
from dmole.models.vision_language import VisionLanguageModel

NEW_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report: `figure` is what was measured, `remedy` what to do where it is not ok."""

    point: int
    name: str
    tower: str
    ok: bool
    figure: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Batches of three samples: images owned 0 1 1 2 and 0 0 2, the latter also as prompts to generate from.

    alone: each sample of the latter by itself; () where batches were made by hand and cannot be taken apart.
    """

    one_two_one: Encoded
    two_none_one: Encoded
    prompts: Encoded
    alone: tuple[Encoded, ...] = ()


def finding(point: int, name: str, tower: str, ok: bool, figure: str, remedy: str = "") -> Finding:
    return Finding(point=point, name=name, tower=tower, ok=ok, figure=figure, remedy="" if ok else remedy)


def tolerance(vlm: VisionLanguageModel) -> float:
    """As a part of an expert's whole effect, which a gate on a wrong row changes by about 1."""
    return 1e-2 if vlm.model.dtype in (torch.float32, torch.float64) else 0.1


def logits(vlm: VisionLanguageModel, batch: Encoded, *, grad: bool = False) -> Tensor:
    inputs = vlm.on_device(batch.inputs)
    if vlm.model.config.is_encoder_decoder and batch.labels is not None:
        # The decoder's inputs are made of them.
        inputs["labels"] = batch.labels.to(vlm.device)
    with torch.set_grad_enabled(grad):
        found: Tensor = vlm.model(**inputs).logits
    return found


def own_logits(logits: Tensor, batch: Encoded, sample: int) -> Tensor:
    """The logits of the sample's real tokens. Some models put image features before the text: the mask ends there."""
    mask = batch.inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or logits.shape[1] < mask.shape[1]:
        return logits[sample]
    real = mask[sample].bool().to(logits.device)
    return logits[sample, -len(real) :][real]


def distance(one: Tensor, other: Tensor, batch: Encoded, sample: int) -> float:
    return float((own_logits(one, batch, sample) - own_logits(other, batch, sample)).abs().max())


def generated(vlm: VisionLanguageModel, prompts: Encoded, *, beams: int) -> Tensor:
    with torch.no_grad():
        found: Tensor = vlm.model.generate(
            **vlm.on_device(prompts.inputs), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
            num_beams=beams,
        )  # fmt: skip
    return found


def relative(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-12))
