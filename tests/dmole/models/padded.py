# SPDX-License-Identifier: Apache-2.0
"""Tiny models of two families that pad images to their batch mates: Idefics2 and Mllama."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from torch import nn
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from .folders import IDEFICS3_TEMPLATE, SQUARE, VISION_SIZES, text_config, token_id, tokenizer


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


PADDED: dict[str, Callable[[], tuple[nn.Module, Any]]] = {"idefics2": idefics2, "mllama": mllama}
