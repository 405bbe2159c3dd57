# SPDX-License-Identifier: Apache-2.0
"""Builds untrained models of transformers' LLaVA classes, and their tokenizer: the mini model's shape, or any other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from mini_cmit.model.stem import STEM_CHANNELS, STEM_STRIDE

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<image>")


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE inside words; every digit and every mark is a token of its own.

    Digits stay apart because a BPE that merges them cannot read numbers: "27" and "2" would share nothing.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d| ?\p{L}+| ?[^\s\p{L}\d]|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>", "<image>"],
    )


def build_network(
    tokenizer: PreTrainedTokenizerFast,
    *,
    channels: int,
    grid: int,
    patch: int,
    vision_width: int,
    vision_layers: int,
    text_width: int,
    text_layers: int,
    heads: int,
    positions: int = 512,
) -> LlavaForConditionalGeneration:
    """SigLIP-type vision tower + two-layer projector + Llama; tied embeddings; torch's default generator."""
    vision = SiglipVisionConfig(
        hidden_size=vision_width,
        intermediate_size=4 * vision_width,
        num_hidden_layers=vision_layers,
        num_attention_heads=heads,
        num_channels=channels,
        image_size=grid * patch,
        patch_size=patch,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=text_width,
        intermediate_size=4 * text_width,
        num_hidden_layers=text_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=cast(int, tokenizer.convert_tokens_to_ids("<image>")),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=grid * grid,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


def build_mini_network(tokenizer: PreTrainedTokenizerFast, side: int) -> LlavaForConditionalGeneration:
    """The mini model: 4 vision layers of width 192 over the stem's map, 4 language layers of width 256; 7 M weights."""
    return build_network(
        tokenizer,
        channels=STEM_CHANNELS,
        grid=side // STEM_STRIDE,
        patch=1,
        vision_width=192,
        vision_layers=4,
        text_width=256,
        text_layers=4,
        heads=4,
    )
