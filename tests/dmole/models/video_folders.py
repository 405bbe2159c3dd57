# SPDX-License-Identifier: Apache-2.0
"""Tiny model folders of two families whose processors have a video processor, which needs torchvision.

Images go through torchvision as well. Qwen2.5-VL takes images of any size as patches of the whole batch, InternVL cuts
them into tiles and adds the whole image. The chat templates follow the families' published ones.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import transformers
from torch import nn
from transformers import ProcessorMixin

from .folders import SQUARE, VISION_SIZES, save_folder, text_config, token_id, tokenizer

CHATML = (
    "{{% for message in messages %}}{{{{ '<|im_start|>' + message['role'] + '\n' }}}}"
    "{{% for part in message['content'] %}}{{% if part['type'] == 'image' %}}{{{{ '{image}' }}}}"
    "{{% elif part['type'] == 'text' %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}{{{{ '<|im_end|>\n' }}}}"
    "{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"
)
END_OF_TURN = "<|im_end|>"


def qwen2_5_vl() -> tuple[nn.Module, ProcessorMixin]:
    special = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>"]
    words = tokenizer(
        special, bos_token="<|endoftext|>", eos_token=END_OF_TURN, image_token="<|image_pad|>",
        video_token="<|video_pad|>",
    )  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    config = transformers.Qwen2_5_VLConfig(
        vision_config=dict(
            patch_size=4, spatial_merge_size=2, temporal_patch_size=2, in_channels=3, num_heads=4, depth=2,
            hidden_size=32, intermediate_size=48, out_hidden_size=32, fullatt_block_indexes=[1], window_size=16,
        ),
        text_config=text_config(words, "qwen2_5_vl_text", rope_parameters=rope),
        image_token_id=token_id(words, "<|image_pad|>"), video_token_id=token_id(words, "<|video_pad|>"),
        vision_start_token_id=token_id(words, "<|vision_start|>"),
        vision_end_token_id=token_id(words, "<|vision_end|>"),
    )  # fmt: skip
    pixels = dict(
        patch_size=4, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 32 * 32}
    )
    processor = transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**pixels), tokenizer=words,
        video_processor=transformers.Qwen2VLVideoProcessor(**pixels),
        chat_template=CHATML.format(image="<|vision_start|><|image_pad|><|vision_end|>"),
    )  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor


def internvl() -> tuple[nn.Module, ProcessorMixin]:
    words = tokenizer(
        ["<|im_start|>"], bos_token="<|endoftext|>", eos_token=END_OF_TURN, context_image_token="<IMG_CONTEXT>",
        start_image_token="<img>", end_image_token="</img>", video_token="<video>",
    )  # fmt: skip
    vision = {**VISION_SIZES, "image_size": [16, 16], "patch_size": [4, 4]}
    config = transformers.InternVLConfig(
        vision_config=dict(**vision, layer_scale_init_value=1.0), text_config=text_config(words, "qwen2"),
        image_token_id=token_id(words, "<IMG_CONTEXT>"), image_seq_length=4,
    )  # fmt: skip
    processor = transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size=SQUARE, min_patches=1, max_patches=2), tokenizer=words,
        video_processor=transformers.InternVLVideoProcessor(size=SQUARE), image_seq_length=4,
        chat_template=CHATML.format(image="<IMG_CONTEXT>\n"),
    )  # fmt: skip
    return transformers.InternVLForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[], tuple[nn.Module, ProcessorMixin]]] = {"qwen2_5_vl": qwen2_5_vl, "internvl": internvl}
RULES = {"qwen2_5_vl": "tokens", "internvl": "tokens"}


def write_video_folder(family: str, path: Path) -> Path:
    return save_folder(FAMILIES[family], END_OF_TURN, path)
