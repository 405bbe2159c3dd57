# SPDX-License-Identifier: Apache-2.0
"""Answers from transformers' `model.generate`, with the settings under `evaluation:`.

    greedy     token = argmax_v l_v                                    do_sample=false, num_beams=1
    beams      the best of num_beams sequences by their log-probability  num_beams > 1
    sampling   token = argmax_v (l_v + g_v),  g_v = -log(-log(u_v))    do_sample=true

l are the logits after temperature, top_k and top_p. For independent u_v from (0, 1) the sampled token has exactly the
distribution softmax(l) (the Gumbel-max trick: Maddison, Tarlow, Minka, "A* Sampling", NeurIPS 2014, section 2). Each
sample draws its u from a generator of its own, named by `evaluation.seed`, the task and the sample's id. So an answer
does not depend on the batch it is generated in, and torch's global random state, from which dropout draws, is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dmole.config import EvaluationSettings
from dmole.seeding import derived_generator

if TYPE_CHECKING:
    from dmole.data.collate import Batch
    from dmole.models.vision_language import VisionLanguageModel


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A generated text without its end token. `cut`: it has no end token within `max_new_tokens` tokens."""

    text: str
    cut: bool


class SampleNoise(LogitsProcessor):
    """Adds Gumbel noise to each row of the logits [B, V], drawn from that row's own generator on the CPU."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        uniform_BV = torch.stack(
            [torch.rand(scores.shape[1], generator=generator, device="cpu") for generator in self.generators]
        )
        # The smallest float32 instead of 0, whose logarithm is infinite.
        noise_BV = -torch.log(-torch.log(uniform_BV.clamp_(min=torch.finfo(torch.float32).tiny)))
        return cast(torch.FloatTensor, scores + noise_BV.to(scores.device))


def generation_config(vlm: VisionLanguageModel, settings: EvaluationSettings) -> GenerationConfig:
    """The GenerationConfig of an evaluation.

    What `evaluation:` names takes precedence over the model's own generation_config.json. Sampling is done by
    `SampleNoise`, so `do_sample` is off here. transformers takes what is not named from the model's file, for example
    tokens that it suppresses.
    """
    ends = sorted(vlm.end_token_ids)
    pad = vlm.tokenizer.pad_token_id
    # transformers does not type its constructor.
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.num_beams,
        length_penalty=settings.length_penalty,
        repetition_penalty=settings.repetition_penalty,
        do_sample=False,
        num_return_sequences=1,
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=ends[0] if pad is None else pad,
    )


def sampling(settings: EvaluationSettings, names: Sequence[str]) -> LogitsProcessorList:
    """What draws the tokens of a batch: temperature, top_k, top_p, then each sample's own noise. Empty if greedy."""
    processors = LogitsProcessorList()
    if settings.do_sample:
        if settings.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k > 0:
            processors.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1.0:
            processors.append(TopPLogitsWarper(settings.top_p))
        processors.append(SampleNoise([derived_generator(settings.seed, "answer", name) for name in names]))
    return processors


@torch.inference_mode()
def generate(
    vlm: VisionLanguageModel, batch: Batch, settings: EvaluationSettings, names: Sequence[str]
) -> list[Answer]:
    """The answer to each left-padded prompt of `batch`, in its order.

    Args:
        names: One per sample, such as "maps/17": what a sampled answer's random numbers are named by.

    The gates that route the samples are open around this call. With beams a layer has `len(batch) * num_beams` rows,
    those of a sample side by side: gates are opened with `units` (see docs/kernels.md).
    """
    if len(names) != len(batch.samples):
        raise ValueError(f"names: got {len(names)} for {len(batch.samples)} samples; expected one each.")
    model = vlm.model
    output = model.generate(
        **vlm.on_device(batch.encoded.inputs),
        generation_config=generation_config(vlm, settings),
        logits_processor=sampling(settings, names),
    )
    tokens_BT = cast(Tensor, output)[:, batch.input_ids.shape[1] :]
    return [Answer(text=text, cut=not ended) for text, ended in vlm.decode(tokens_BT.tolist())]
