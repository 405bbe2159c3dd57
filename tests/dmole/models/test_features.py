# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from dmole.models.features import text_features, vision_features
from dmole.models.prompts import Encoded, encode, instruction_ids

from .conversations import Declared, picture, user
from .folders import FAMILIES, write_folder
from .padded import PADDED

TOWERS = {
    "llava": "model.vision_tower",
    "llava_next": "model.vision_tower",
    "idefics3": "model.vision_model",
    "gemma3": "model.vision_tower",
    "paddleocr_vl": "model.visual",
    "idefics2": "model.vision_model",
    "mllama": "model.vision_model",
}
LANGUAGE = {"idefics3": "model.text_model", "idefics2": "model.text_model"}
IMAGE_TOKENS = {"idefics3": "<image>", "paddleocr_vl": "<|IMAGE_PLACEHOLDER|>"}


@pytest.fixture(scope="module", params=TOWERS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def loaded(family: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The model, its weights drawn wide enough that images differ, and its processor."""
    if family in FAMILIES:
        folder: Path = write_folder(family, tmp_path_factory.mktemp(family))
        model: Any = AutoModelForImageTextToText.from_pretrained(folder)
        processor: Any = AutoProcessor.from_pretrained(folder)
    else:
        torch.manual_seed(0)
        model, processor = PADDED[family]()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.2, generator=generator)
    return model.eval().requires_grad_(False), processor


CONVERSATIONS = [
    [user("What is it?", picture(40, 20, 0))],
    [user("What is the capital of this country?")],
    [user("Compare the two images.", picture(20, 40, 1), picture(16, 16, 2))],
    [user("Yes or no?", picture(16, 16, 3))],
]


def units(family: str, processor: Any, encoded: Encoded) -> list[int]:
    """As the declarations have it: images, image tokens, or one a sample."""
    if family in IMAGE_TOKENS:
        counts = encoded.inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKENS[family])
        return [int(n) for n in counts.sum(1)]
    return [1] * len(encoded.images) if family == "mllama" and any(encoded.images) else list(encoded.images)


def features(family: str, loaded: tuple[Any, Any], conversations: list[Any], tiles: list[int]) -> tuple[Tensor, Tensor]:
    model, processor = loaded
    encoded = encode(processor, conversations, with_answers=False, declaration=Declared())
    given = tiles if family == "llava_next" else units(family, processor, encoded)
    width = 64 if family == "mllama" else None
    return vision_features(model, TOWERS[family], encoded.inputs, given, width=width)


TILES = [3, 0, 6, 3]  # LLaVA-NeXT's: the whole image and its two parts, for each image


def test_vision_features_do_not_depend_on_batch_mates(family: str, loaded: tuple[Any, Any]) -> None:
    together, seen = features(family, loaded, CONVERSATIONS, TILES)
    assert seen.tolist() == [True, False, True, True]
    assert not together[1].any() and together.isfinite().all() and together.dtype == torch.float32
    for s, conversation in enumerate(CONVERSATIONS):
        alone, has_image = features(family, loaded, [conversation], [TILES[s]])
        assert has_image.tolist() == [seen[s]]
        torch.testing.assert_close(together[s], alone[0], rtol=1e-4, atol=1e-5)
    distances = torch.cdist(together, together) + 10 * torch.eye(4)
    assert distances.min() > 0.05


def test_text_features_do_not_depend_on_batch_mates(family: str, loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    tower = LANGUAGE.get(family, "model.language_model")
    texts = ["What is it?", "Describe the image in one sentence. Answer briefly. yes no red green", "A B"]
    together = text_features(model, tower, *instruction_ids(processor, texts))
    for s, text in enumerate(texts):
        alone = text_features(model, tower, *instruction_ids(processor, [text]))
        torch.testing.assert_close(together[s], alone[0], rtol=1e-4, atol=1e-5)
    assert (torch.cdist(together, together) + 10 * torch.eye(3)).min() > 0.05


def test_a_batch_without_images_has_zeros(family: str, loaded: tuple[Any, Any]) -> None:
    found, seen = features(family, loaded, [CONVERSATIONS[1]] * 2, [0, 0])
    width = features(family, loaded, CONVERSATIONS, TILES)[0].shape[1]
    assert found.shape == (2, width) and not found.any() and seen.tolist() == [False, False]
