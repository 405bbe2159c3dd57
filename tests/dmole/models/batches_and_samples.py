# SPDX-License-Identifier: Apache-2.0
"""Batches with one image, several and none, and the check that each of their samples is what it is alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dmole.models.prompts import encode

from .conversations import NONE, ONE, SMALL, TWO, Declared, assistant, user


def widened(network: nn.Module) -> nn.Module:
    """Weights drawn wide enough that an image shows in the logits."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1 and "embed" not in name:
            parameter.data.normal_(std=0.2, generator=generator)
    return network


BATCHES = {
    "one": [ONE],
    "two": [TWO],
    "none": [NONE],
    "same": [ONE, [user("Describe it.", SMALL), assistant("no")]],
    "images": [ONE, TWO],
    "mixed": [ONE, NONE, TWO],
    "text_first": [NONE, ONE, [user("Describe it.", SMALL), assistant("no")]],
}


def check_batch(processor: Any, model: Any, batch: str, with_answers: bool) -> None:
    """Ids, labels and logits of every sample are those of the sample alone."""
    together = encode(processor, BATCHES[batch], with_answers=with_answers, declaration=Declared())
    mask = together.inputs["attention_mask"]
    assert mask[:, 0 if with_answers else -1].all()  # right padding, left padding
    with torch.no_grad():
        logits = model(**together.inputs).logits
        for s, conversation in enumerate(BATCHES[batch]):
            alone = encode(processor, [conversation], with_answers=with_answers, declaration=Declared())
            kept = mask[s] == 1
            assert together.inputs["input_ids"][s, kept].tolist() == alone.inputs["input_ids"][0].tolist()
            if with_answers:
                assert together.labels is not None and alone.labels is not None
                assert together.labels[s, kept].tolist() == alone.labels[0].tolist()
            assert together.prompt_lengths[s] == alone.prompt_lengths[0]
            torch.testing.assert_close(logits[s, kept], model(**alone.inputs).logits[0], rtol=1e-4, atol=1e-4)
