# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, SiglipVisionConfig
from transformers.modeling_outputs import BaseModelOutput

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
        with torch.random.fork_rng(devices=[]):
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

TEXT_ONLY = 1
TILES = [3, 0, 6, 3]  # LLaVA-NeXT's: the whole image and its two parts, for each image


def units(family: str, processor: Any, encoded: Encoded) -> list[int]:
    """As the declarations have it: images, image tokens, or one a sample."""
    if family in IMAGE_TOKENS:
        counts = encoded.inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKENS[family])
        return [int(n) for n in counts.sum(1)]
    return [1] * len(encoded.images) if family == "mllama" and any(encoded.images) else list(encoded.images)


def features(family: str, loaded: tuple[Any, Any], samples: list[int]) -> tuple[Tensor, Tensor]:
    """Of some of CONVERSATIONS."""
    model, processor = loaded
    some = [CONVERSATIONS[s] for s in samples]
    encoded = encode(processor, some, with_answers=False, declaration=Declared())
    given = [TILES[s] for s in samples] if family == "llava_next" else units(family, processor, encoded)
    return vision_features(model, TOWERS[family], encoded.inputs, given, width=64 if family == "mllama" else None)


def mixed(family: str) -> list[int]:
    """All samples; Mllama's batches cannot mix samples with and without images."""
    return [0, 2, 3] if family == "mllama" else [0, 1, 2, 3]


def test_vision_features_do_not_depend_on_batch_mates(family: str, loaded: tuple[Any, Any]) -> None:
    samples = mixed(family)
    together, seen = features(family, loaded, samples)
    assert seen.tolist() == [s != TEXT_ONLY for s in samples]
    assert together.isfinite().all() and together.dtype == torch.float32
    for row, s in enumerate(samples):
        alone, has_image = features(family, loaded, [s])
        assert has_image.tolist() == [s != TEXT_ONLY]
        assert bool(together[row].any()) == (s != TEXT_ONLY)
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)
    distances = torch.cdist(together, together) + 10 * torch.eye(len(samples))
    assert distances.min() > 0.05


@pytest.mark.parametrize("family", ["mllama"], indirect=True)
def test_images_that_only_pad_a_batch_are_left_out(family: str, loaded: tuple[Any, Any]) -> None:
    model, processor = loaded

    def by_processor(samples: list[int]) -> Tensor:
        inputs = processor.apply_chat_template(
            [CONVERSATIONS[s] for s in samples], tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"text_kwargs": {"padding": True}},
        )  # fmt: skip
        return vision_features(model, TOWERS[family], inputs, [1] * len(samples))[0]

    together = by_processor([0, 2, 3])
    for row, s in enumerate([0, 2, 3]):
        torch.testing.assert_close(together[row], by_processor([s])[0], rtol=1e-4, atol=1e-5)


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
    found, seen = features(family, loaded, [TEXT_ONLY, TEXT_ONLY])
    width = features(family, loaded, [0])[0].shape[1]
    assert found.shape == (2, width) and not found.any() and seen.tolist() == [False, False]


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_features_are_the_plain_maxima_of_the_towers(family: str, loaded: tuple[Any, Any]) -> None:
    """What `vision_tower` and `language_model` return when they are called by hand, bit for bit."""
    model, processor = loaded
    encoded = encode(processor, CONVERSATIONS[:1] + CONVERSATIONS[3:], with_answers=False, declaration=Declared())
    found, _ = vision_features(model, TOWERS[family], encoded.inputs, encoded.images)
    hidden = model.model.vision_tower(pixel_values=encoded.inputs["pixel_values"]).last_hidden_state
    assert torch.equal(found, hidden.amax(1))
    ids, mask = instruction_ids(processor, ["What is it?", "Describe the image in one sentence."])
    hidden = model.model.language_model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(
        text_features(model, "model.language_model", ids, mask),
        hidden.masked_fill(mask[..., None] == 0, float("-inf")).amax(1),
    )


def test_nothing_is_made_on_the_default_device(family: str, loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    expected, _ = features(family, loaded, mixed(family))
    ids, mask = instruction_ids(processor, ["What is it?", "A B"])
    tower = LANGUAGE.get(family, "model.language_model")
    texts = text_features(model, tower, ids, mask)
    torch.set_default_device("meta")
    try:
        found, seen = features(family, loaded, mixed(family))
        zeros, _ = features(family, loaded, [TEXT_ONLY])
        again = text_features(model, tower, ids, mask)
    finally:
        torch.set_default_device(None)
    assert {value.device.type for value in (found, seen, zeros, again)} == {"cpu"}
    assert torch.equal(found, expected) and torch.equal(again, texts)


class Tower(nn.Module):
    """Returns what it is given, as a tower of any family might."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SiglipVisionConfig(hidden_size=3)

    def forward(self, pixel_values: Any) -> Any:
        return pixel_values


class Model(nn.Module):
    """Calls its tower with the pieces of `pieces`, one call each, or not at all."""

    def __init__(self, *pieces: Any) -> None:
        super().__init__()
        self.tower, self.pieces = Tower(), pieces

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> None:
        for piece in self.pieces:
            self.tower(piece)


ROWS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
OUTPUTS = {
    "rows": [ROWS],
    "one_row_of_rows": [ROWS[None]],
    "images_of_tokens": [ROWS.view(3, 2, 3)],
    "tuple": [(ROWS, None)],
    "output": [BaseModelOutput(last_hidden_state=ROWS)],
    "list_of_images": [[ROWS[:1], ROWS[1:4], ROWS[4:]]],
    "calls": [ROWS[None, :1], ROWS[None, 1:4], ROWS[None, 4:]],
}


@pytest.mark.parametrize("shape", OUTPUTS)
def test_towers_of_every_output_shape(shape: str) -> None:
    """Three images, of samples 0, 2 and 2."""
    unequal = shape in ("list_of_images", "calls")
    parts = (ROWS[:1], ROWS[1:]) if unequal else (ROWS[:2], ROWS[2:])
    inputs = {"input_ids": torch.zeros(3, 1, dtype=torch.long), "pixel_values": torch.ones(3, 3, 2, 2)}
    found, seen = vision_features(Model(*OUTPUTS[shape]), "tower", inputs, [1, 0, 2])
    assert torch.equal(found, torch.stack([parts[0].amax(0), torch.zeros(3), parts[1].amax(0)]))
    assert seen.tolist() == [True, False, True]


def test_towers_that_do_not_fit_are_refused() -> None:
    inputs = {"input_ids": torch.zeros(2, 1, dtype=torch.long), "pixel_values": torch.ones(2, 3, 2, 2)}
    with pytest.raises(ValueError, match=r"units: got \[1, 3\] for the 6 rows .* Set declaration.rows"):
        vision_features(Model(ROWS), "tower", inputs, [1, 3])
    with pytest.raises(ValueError, match="declaration.vision: got 'tower', which a batch with images does not call"):
        vision_features(Model(), "tower", inputs, [1, 1])
    silent = Model(ROWS)
    del silent.tower.config
    with pytest.raises(ValueError, match="width: got none for a batch without images"):
        vision_features(silent, "tower", inputs, [0, 0])
    assert vision_features(silent, "tower", inputs, [0, 0], width=5)[0].shape == (2, 5)
    with pytest.raises(ValueError, match=r"declaration.text_features: got a last hidden state None from 'tower'"):
        text_features(TextModel(), "tower", inputs["input_ids"], torch.ones(2, 1, dtype=torch.long))


class TextModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = TextTower()


class TextTower(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return input_ids
