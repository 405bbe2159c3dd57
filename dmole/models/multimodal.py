# SPDX-License-Identifier: Apache-2.0
"""A multimodal model as the rest of dmole sees it: two towers of linears, and a processor of images and text.

The network itself is transformers' own (``LlavaForConditionalGeneration``); nothing of it is subclassed or patched.
Prompt of a sample, with the image's tokens first:  ``<bos> <image> x n  <user> instruction <assistant> answer <eos>``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    SiglipVisionConfig,
)
from transformers.utils import logging

WEIGHTS_FILE = "model.safetensors"
PROCESSOR_FILE = "processor_config.json"

TOWER_PREFIX = {"vision": "model.vision_tower.", "language": "model.language_model."}


@dataclass(frozen=True)
class MultimodalModel:
    """transformers' LLaVA classes with what continual training needs around them."""

    model: LlavaForConditionalGeneration
    processor: ProcessorMixin
    candidates: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.candidates:
            object.__setattr__(self, "candidates", candidate_linears(self.model))
        self.model.requires_grad_(False).train(False)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return cast(PreTrainedTokenizerBase, self.processor.tokenizer)

    def pixel_values(self, images: Sequence[Path]) -> Tensor:
        """Image files -> [B, C, H, W] float32, as the processor makes them of the opened images."""
        opened = []
        for path in images:
            with Image.open(path) as image:
                image.load()
            opened.append(image)
        return cast(Tensor, self.processor.image_processor(opened, return_tensors="pt")["pixel_values"])

    @property
    def image_tokens(self) -> int:
        """Tokens one image takes in the language model's sequence."""
        vision = cast(SiglipVisionConfig, self.model.config.vision_config)
        return (cast(int, vision.image_size) // cast(int, vision.patch_size)) ** 2

    def prompt_ids(self, instruction: str) -> list[int]:
        """``<bos> <image> x n <user> instruction <assistant>``: everything before the answer."""
        image = [self.model.config.image_token_id] * self.image_tokens
        return [self._id("<bos>"), *image, self._id("<user>"), *self.text_ids(instruction), self._id("<assistant>")]

    def answer_ids(self, answer: str) -> list[int]:
        """The answer's tokens and the end."""
        return [*self.text_ids(answer), self._id("<eos>")]

    def text_ids(self, text: str) -> list[int]:
        """Text alone, no special tokens: what the router's text feature reads.

        A space goes in front so that a word has the same tokens at the start of a text as inside it.
        """
        return cast(list[int], self.tokenizer.encode(f" {text}", add_special_tokens=False))

    def inputs_digest(self) -> str:
        """The sha256 of what turns samples into tensors: the image processor and the tokenizer's rules."""
        # Padding and truncation are left out: calls change them.
        rules = json.loads(cast(Any, self.tokenizer).backend_tokenizer.to_str())
        parts = [rules[name] for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")]
        images = self.processor.image_processor.to_dict()
        return hashlib.sha256(json.dumps([images, *parts], sort_keys=True).encode()).hexdigest()

    def decode(self, ids: Sequence[int]) -> str:
        """Generated tokens -> text, cut at the end token."""
        ids = list(ids)
        end = self._id("<eos>")
        kept = ids[: ids.index(end)] if end in ids else ids
        return cast(str, self.tokenizer.decode(kept, skip_special_tokens=True)).strip()

    def vision_features(self, pixel_values: Tensor) -> Tensor:
        """[B, T, D]: last hidden state of the vision tower."""
        return cast(Tensor, self.model.model.vision_tower(pixel_values=pixel_values).last_hidden_state)

    def text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, T, D]: last hidden state of the language model on text alone."""
        output = self.model.model.language_model(input_ids=input_ids, attention_mask=attention_mask)
        return cast(Tensor, output.last_hidden_state)

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


def candidate_linears(model: nn.Module, endings: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """Qualified names of every ``nn.Linear`` inside the transformer layers of each tower, in depth order.

    ``endings`` keeps only names that end so, e.g. ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj") for the paper's
    attention-only candidates. The projector, the embeddings and the head are never candidates (paper, section 5.1).
    """
    found = {
        tower: tuple(
            name
            for name, module in model.named_modules()
            if name.startswith(prefix)
            and ".layers." in name
            and isinstance(module, nn.Linear)
            and (not endings or name.endswith(tuple(endings)))
        )
        for tower, prefix in TOWER_PREFIX.items()
    }
    for tower, names in found.items():
        if not names:
            raise ValueError(
                f"candidates: the {tower} tower has no linear layer under {TOWER_PREFIX[tower]!r} ending in "
                f"{list(endings)}; expected at least one. Check the endings, or use a model whose "
                f"{tower} tower is a transformer."
            )
    return found


def load_model(folder: str | Path, *, candidates: Sequence[str] = ()) -> MultimodalModel:
    """Reads a transformers folder of a LLaVA with its processor; float32, frozen, in evaluation mode.

    ``candidates``: endings of the linears that may carry experts (``candidate_linears``); () means every linear.
    Raises FileNotFoundError naming the missing file, ValueError when weights and config disagree.
    """
    folder = Path(folder)
    for name in (WEIGHTS_FILE, "config.json", "tokenizer.json", PROCESSOR_FILE):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"model: {folder / name} does not exist; expected a folder written by MultimodalModel.save."
            )
    with _no_progress_bar():
        loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, found = loaded
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing or unexpected:
        raise ValueError(
            f"model: {folder / WEIGHTS_FILE} lacks {missing[:3]} and has unknown {unexpected[:3]}; expected the "
            f"tensors of config.json. The folder mixes two models: save it again."
        )
    return MultimodalModel(
        model=model,
        processor=AutoProcessor.from_pretrained(folder),  # type: ignore[no-untyped-call]
        candidates=candidate_linears(model, candidates),
    )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws a bar over the weights, which would run through dmole's own display."""
    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
