# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from dmole.models.features import text_features, vision_features
from dmole.models.prompts import Encoded, encode, instruction_ids

from .folders import FAMILIES, IDEFICS3_TEMPLATE, SQUARE, VISION_SIZES, text_config, token_id, tokenizer, write_folder


@dataclass(frozen=True)
class Declared:
    labels: str = "prefix"


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


def idefics2() -> tuple[nn.Module, Any]:
    """Images of any size, padded to the largest of the batch with a mask of pixels."""
    special = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    words = tokenizer(special, bos_token="<|begin_of_text|>", eos_token="<end_of_utterance>")
    config = transformers.Idefics2Config(
        vision_config=dict(**{**VISION_SIZES, "image_size": 40}), text_config=text_config(words, "llama"),
        perceiver_config=dict(
            resampler_n_latents=4, resampler_depth=1, resampler_n_heads=4, resampler_head_dim=8, num_key_value_heads=2,
            hidden_size=32,
        ),
        image_token_id=token_id(words, "<image>"), tie_word_embeddings=False,
    )  # fmt: skip
    processor = transformers.Idefics2Processor(
        image_processor=Idefics2ImageProcessorPil(
            size={"shortest_edge": 8, "longest_edge": 40}, do_image_splitting=False
        ),
        tokenizer=words, image_seq_len=4, chat_template=IDEFICS3_TEMPLATE,
    )  # fmt: skip
    return transformers.Idefics2ForConditionalGeneration(config), processor


def mllama() -> tuple[nn.Module, Any]:
    """Every sample padded to the most images of the batch, every image to the most tiles."""
    words = tokenizer(["<|image|>", "<|eot|>", "<|python_tag|>"], bos_token="<s>", eos_token="</s>")
    template = (
        "{{ bos_token }}{% for message in messages %}{{ message['role'] + ':' }}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '<|image|>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|eot|>"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    config = transformers.MllamaConfig(
        vision_config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_global_layers=1, attention_heads=4,
            image_size=16, patch_size=4, max_num_tiles=2, supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
            intermediate_layers_indices=[0], vision_output_dim=64,
        ),
        text_config=text_config(words, "mllama_text_model", cross_attention_layers=[1]),
        image_token_index=token_id(words, "<|image|>"),
    )  # fmt: skip
    processor = transformers.MllamaProcessor(
        image_processor=MllamaImageProcessorPil(size=SQUARE, max_image_tiles=2), tokenizer=words, chat_template=template
    )
    model: nn.Module = transformers.MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("gate", "gate_attn", "gate_ffn", "cross_attn_attn_gate", "cross_attn_mlp_gate")):
            nn.init.ones_(parameter)  # zero as they come: no image would reach a logit
    return model, processor


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
        model, processor = {"idefics2": idefics2, "mllama": mllama}[family]()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.2, generator=generator)
    return model.eval().requires_grad_(False), processor


def picture(width: int, height: int, seed: int) -> Image.Image:
    pixels = torch.randint(1, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


def asked(text: str, *images: Image.Image) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


CONVERSATIONS = [
    asked("What is it?", picture(40, 20, 0)),
    asked("What is the capital of this country?"),
    asked("Compare the two images.", picture(20, 40, 1), picture(16, 16, 2)),
    asked("Yes or no?", picture(16, 16, 3)),
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
