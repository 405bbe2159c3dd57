# SPDX-License-Identifier: Apache-2.0
"""The mini model as its own pretraining sees it: the network, its processor, and token ids made without a template.

Prompt of a sample, with the image's tokens first:  ``<bos> <image> x n  <user> instruction <assistant> answer <eos>``.
`dmole` reads the same folder as any other model's (`dmole.models.loading.load`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    SiglipVisionConfig,
)

from dmole.models.progress_bars import no_progress_bars

WEIGHTS_FILE = "model.safetensors"
PROCESSOR_FILE = "processor_config.json"


@dataclass(frozen=True)
class BaseModel:
    """transformers' LLaVA classes, unmodified, with what pretraining needs around them."""

    model: LlavaForConditionalGeneration
    processor: ProcessorMixin

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return cast(PreTrainedTokenizerBase, self.processor.tokenizer)

    @property
    def image_tokens(self) -> int:
        """Tokens one image takes in the language model's sequence."""
        vision = cast(SiglipVisionConfig, self.model.config.vision_config)
        return (cast(int, vision.image_size) // cast(int, vision.patch_size)) ** 2

    def prompt_ids(self, instruction: str) -> list[int]:
        """``<bos> <image> x n <user> instruction <assistant>``: everything before the answer."""
        image = [self.model.config.image_token_id] * self.image_tokens
        return [self._id("<bos>"), *image, self._id("<user>"), *self.text_ids(instruction), self._id("<assistant>")]

    def text_ids(self, text: str) -> list[int]:
        """Text alone, no special tokens.

        A space goes in front so that a word has the same tokens at the start of a text as inside it.
        """
        return cast(list[int], self.tokenizer.encode(f" {text}", add_special_tokens=False))

    def vision_features(self, pixel_values: Tensor) -> Tensor:
        """[B, T, D]: last hidden state of the vision tower."""
        return cast(Tensor, self.model.model.vision_tower(pixel_values=pixel_values).last_hidden_state)

    def save(self, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
        """A transformers folder: the processor, and weights in ``dtype`` (half the size; loading gives float32)."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.to(dtype).contiguous() for k, v in self.model.state_dict().items() if k != "lm_head.weight"}
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        self.model.config.dtype = torch.float32  # in memory, whatever the file holds
        self.model.config.save_pretrained(folder)
        self.model.generation_config.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def _id(self, token: str) -> int:
        return cast(int, self.tokenizer.convert_tokens_to_ids(token))


def load_base(folder: str | Path) -> BaseModel:
    """The model of a folder in float32, to be trained on. Raises ValueError when weights and config disagree."""
    with no_progress_bars():
        loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, found = loaded
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing or unexpected:
        raise ValueError(
            f"model: {Path(folder) / WEIGHTS_FILE} lacks {missing[:3]} and has unknown {unexpected[:3]}; expected the "
            f"tensors of config.json. The folder mixes two models: save it again."
        )
    return BaseModel(model=model, processor=AutoProcessor.from_pretrained(folder))  # type: ignore[no-untyped-call]
