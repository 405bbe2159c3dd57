# SPDX-License-Identifier: Apache-2.0
"""A multimodal model as the rest of dmole sees it: two towers of linears, a tokenizer, an image processor.

The network itself is transformers' own (``LlavaForConditionalGeneration``); nothing of it is subclassed or patched.
Prompt of a sample, with the image's tokens first:  ``<bos> <image> x n  <user> instruction <assistant> answer <eos>``.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import PIL
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
    SiglipVisionConfig,
)

from dmole.cache import ImageFeatureCache, cache_folder
from dmole.models.stem import EfficientNetLite0, stem_digest

WEIGHTS_FILE = "model.safetensors"
STEM_FILE = "stem.safetensors"
PROCESSOR_FILE = "image_processor.json"

TOWER_PREFIX = {"vision": "model.vision_tower.", "language": "model.language_model."}


class ImageProcessor(Protocol):
    """Image files -> ``pixel_values`` [B, C, H, W] float32; equal ``version``, equal values."""

    @property
    def version(self) -> str: ...

    def __call__(self, images: Sequence[Path]) -> Tensor: ...

    def save(self, folder: Path) -> None: ...


class StemProcessor:
    """Image file -> standardised stem features [C, S/32, S/32] (``dmole.models.stem``), cached on disk.

    Standardised per channel with the mean and deviation over the pretraining images: the three depths that the map
    joins differ by an order of magnitude, and one of them would otherwise drown the others. Clipped at five deviations:
    the network's channels are sparse, and single values of sixty would decide the first layer's output.
    """

    CLIP = 5.0

    def __init__(self, side: int, mean: Tensor, deviation: Tensor, folder: Path | None = None):
        self.side = side
        self.mean = mean
        self.deviation = deviation
        self._stem: EfficientNetLite0 | None = None
        digest = hashlib.sha256(mean.numpy().tobytes() + deviation.numpy().tobytes()).hexdigest()
        self.version = f"efficientnet-lite0/{side}/{self.CLIP}/{digest}"
        self.cache = ImageFeatureCache((folder or cache_folder()) / "stem_features", self._made_by, self.compute)

    def __call__(self, images: Sequence[Path]) -> Tensor:
        return self.cache.features(images)

    def compute(self, image: Path) -> Tensor:
        """The features [C, S/32, S/32] of one image, without the cache."""
        if self._stem is None:
            # Two threads may both get here and load it twice; the weights are the same.
            self._stem = EfficientNetLite0()
        pixels_HWC = torch.from_numpy(read_image(image, self.side).copy())
        return self.standardise(self._stem(pixels_HWC.permute(2, 0, 1)[None]))[0]

    def _made_by(self) -> str:
        """What cached features follow from besides images and arithmetic; Pillow decodes and resizes."""
        code = "".join(inspect.getsource(part) for part in (StemProcessor, read_image))
        return json.dumps([self.version, stem_digest(), PIL.__version__, code])

    def standardise(self, features_BCHW: Tensor) -> Tensor:
        """(x - mean) / deviation per channel, clipped."""
        return ((features_BCHW - self.mean[:, None, None]) / self.deviation[:, None, None]).clamp_(
            -self.CLIP, self.CLIP
        )

    def save(self, folder: Path) -> None:
        (folder / PROCESSOR_FILE).write_text(
            json.dumps({"kind": "efficientnet-lite0", "side": self.side}, indent=2) + "\n"
        )
        save_file({"mean": self.mean, "deviation": self.deviation}, folder / STEM_FILE)

    @classmethod
    def load(cls, folder: Path) -> StemProcessor:
        settings = json.loads((folder / PROCESSOR_FILE).read_text())
        statistics = load_file(folder / STEM_FILE)
        return cls(settings["side"], statistics["mean"], statistics["deviation"])


class PixelProcessor:
    """Image file -> pixels [3, side, side] scaled to -1..1: the plain processor of a model that learns from pixels."""

    def __init__(self, side: int):
        self.side = side
        self.version = f"pixels/{side}"

    def __call__(self, images: Sequence[Path]) -> Tensor:
        pixels = np.stack([read_image(image, self.side) for image in images])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)

    def save(self, folder: Path) -> None:
        (folder / PROCESSOR_FILE).write_text(json.dumps({"kind": "pixels", "side": self.side}, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> PixelProcessor:
        return cls(json.loads((folder / PROCESSOR_FILE).read_text())["side"])


def read_image(path: Path, side: int) -> np.ndarray:
    """RGB uint8 [side, side, 3]; bicubic when the file has another size."""
    with Image.open(path) as image:
        rgb = image.convert("RGB")
        return np.asarray(rgb if rgb.size == (side, side) else rgb.resize((side, side), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class MultimodalModel:
    """transformers' LLaVA classes with what continual training needs around them."""

    model: LlavaForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    pixel_values: ImageProcessor
    candidates: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.candidates:
            object.__setattr__(self, "candidates", candidate_linears(self.model))
        self.model.requires_grad_(False).train(False)

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
        return hashlib.sha256(json.dumps([self.pixel_values.version, *parts]).encode()).hexdigest()

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
        """Weights in ``dtype`` (half the size; loading gives float32 again), config, tokenizer, image processor."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.to(dtype).contiguous() for k, v in self.model.state_dict().items() if k != "lm_head.weight"}
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        self.model.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.pixel_values.save(folder)

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
    """Reads what ``MultimodalModel.save`` wrote; float32, frozen, in evaluation mode.

    ``candidates``: endings of the linears that may carry experts (``candidate_linears``); () means every linear.
    Raises FileNotFoundError naming the missing file, ValueError when weights and config disagree.
    """
    folder = Path(folder)
    for name in (WEIGHTS_FILE, "config.json", "tokenizer.json", PROCESSOR_FILE):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"model: {folder / name} does not exist; expected a folder written by MultimodalModel.save."
            )
    config = LlavaConfig.from_pretrained(folder)
    model = LlavaForConditionalGeneration(config)
    state = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if name != "lm_head.weight"]  # tied to the embedding
    if missing or unexpected:
        raise ValueError(
            f"model: {folder / WEIGHTS_FILE} lacks {missing[:3]} and has unknown {unexpected[:3]}; expected the "
            f"tensors of config.json. The folder mixes two models: save it again."
        )
    model.tie_weights()
    # On a CPU the backward of the flash kernel costs a quarter of a step on sequences this short; on a GPU either does.
    model.set_attn_implementation("eager")
    kind = json.loads((folder / PROCESSOR_FILE).read_text())["kind"]
    processors: dict[str, Callable[[Path], ImageProcessor]] = {
        "efficientnet-lite0": StemProcessor.load,
        "pixels": PixelProcessor.load,
    }
    if kind not in processors:
        raise ValueError(
            f"model: {folder / PROCESSOR_FILE} names the image processor {kind!r}; "
            f"expected one of {sorted(processors)}."
        )
    return MultimodalModel(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        pixel_values=processors[kind](folder),
        candidates=candidate_linears(model, candidates),
    )
