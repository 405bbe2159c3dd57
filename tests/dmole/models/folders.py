# SPDX-License-Identifier: Apache-2.0
"""Tiny model folders of five families, written by `save_pretrained`: network, tokenizer, image processor, template.

Their image processors need no torchvision. Chat templates follow the families' published ones, so the folders differ
where real ones do: the LLaVA templates write no end of turn, Gemma's and Idefics3's write more text after it, Idefics3
and LLaVA-NeXT cut an image into tiles, PaddleOCR-VL takes images of any size as one row of patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil

POSITIONS = 512
CORPUS = (
    "Describe the image in one sentence.",
    "Answer with the letter. A B C D",
    "Answer briefly. yes no red green blue",
    "What is the capital of this country? USER: ASSISTANT: User: Assistant:",
    "".join(map(chr, range(32, 127))),
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}"
    "{% else %}{{ content['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
IDEFICS3_TEMPLATE = (
    "<|begin_of_text|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' }}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{{ '<start_of_image>' }}{% elif item['type'] == 'text' %}"
    "{{ item['text'] | trim }}{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PADDLEOCR_VL_TEMPLATE = (
    "{{ '<|begin_of_sentence|>' }}{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{ '\n' }}{% else %}{{ 'Assistant:\n' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + eos_token }}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)

TEXT_SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=POSITIONS,
)  # fmt: skip
VISION_SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4,
    num_channels=3,
)  # fmt: skip
SQUARE = {"height": 16, "width": 16}


def tokenizer(
    special: Sequence[str], *, words: bool = False, corpus: Iterable[str] = CORPUS, size: int = 400, **named: str
) -> PreTrainedTokenizerFast:
    """A trained BPE; `words` marks the starts of words and has `<unk>`, as Llama's; otherwise it works on bytes.

    `named` are tokens with a role of their own (`image_token="<image>"`).
    """
    tokens = ["<pad>", "<unk>", *dict.fromkeys([*special, *named.values()])]
    trained = Tokenizer(models.BPE(unk_token="<unk>") if words else models.BPE())
    if words:
        trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        trained.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = [*map(chr, range(33, 127)), "\n", "▁"]
    else:
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trained.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(corpus, trainer)
    own = {name: token for name, token in named.items() if name in ("bos_token", "eos_token")}
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        pad_token="<pad>",
        unk_token="<unk>",
        **own,
        extra_special_tokens={name: token for name, token in named.items() if name not in own},
        additional_special_tokens=[token for token in tokens[2:] if token not in own.values()],
    )


def text_config(words: PreTrainedTokenizerFast, kind: str, **more: Any) -> dict[str, Any]:
    ids = dict(pad_token_id=words.pad_token_id, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id)
    return dict(model_type=kind, vocab_size=len(words), **TEXT_SIZES, **ids, **more)


def token_id(words: PreTrainedTokenizerFast, token: str) -> int:
    return int(words.convert_tokens_to_ids(token))


def llava() -> tuple[nn.Module, ProcessorMixin]:
    words = tokenizer(["<image>"], words=True, bos_token="<s>", eos_token="</s>")
    config = transformers.LlavaConfig(
        vision_config=dict(model_type="clip_vision_model", projection_dim=32, **VISION_SIZES),
        text_config=text_config(words, "llama"), image_token_index=token_id(words, "<image>"), image_seq_length=16,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    processor = transformers.LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE), tokenizer=words,
        patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config), processor


def llava_next() -> tuple[nn.Module, ProcessorMixin]:
    words = tokenizer(["<image>"], words=True, bos_token="<s>", eos_token="</s>")
    tiles = [[16, 32], [32, 16], [32, 32]]
    config = transformers.LlavaNextConfig(
        vision_config=dict(model_type="clip_vision_model", projection_dim=32, **VISION_SIZES),
        text_config=text_config(words, "llama"), image_token_index=token_id(words, "<image>"), image_seq_length=16,
        image_grid_pinpoints=tiles, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    processor = transformers.LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": 16}, crop_size=SQUARE, image_grid_pinpoints=tiles
        ),
        tokenizer=words, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )  # fmt: skip
    return transformers.LlavaNextForConditionalGeneration(config), processor


def idefics3() -> tuple[nn.Module, ProcessorMixin]:
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    special = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *tiles]
    words = tokenizer(special, size=450, bos_token="<|begin_of_text|>", eos_token="<end_of_utterance>")
    config = transformers.Idefics3Config(
        vision_config=dict(**VISION_SIZES), text_config=text_config(words, "llama"),
        image_token_id=token_id(words, "<image>"), scale_factor=2, pad_token_id=words.pad_token_id,
        tie_word_embeddings=False,
    )  # fmt: skip
    processor = transformers.Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16}),
        tokenizer=words, image_seq_len=4, chat_template=IDEFICS3_TEMPLATE,
    )  # fmt: skip
    return transformers.Idefics3ForConditionalGeneration(config), processor


def gemma3() -> tuple[nn.Module, ProcessorMixin]:
    words = tokenizer(
        ["<start_of_turn>", "<end_of_turn>"], words=True, bos_token="<bos>", eos_token="<eos>",
        boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>",
    )  # fmt: skip
    config = transformers.Gemma3Config(
        vision_config=dict(model_type="siglip_vision_model", **VISION_SIZES),
        text_config=text_config(words, "gemma3_text", head_dim=8, sliding_window=64), mm_tokens_per_image=4,
        image_token_index=token_id(words, "<image_soft_token>"), boi_token_index=token_id(words, "<start_of_image>"),
        eoi_token_index=token_id(words, "<end_of_image>"),
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(config)
    # Zero as it comes: no image would reach a logit.
    nn.init.normal_(model.get_parameter("model.multi_modal_projector.mm_input_projection_weight"), std=0.2)
    processor = transformers.Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size=SQUARE), tokenizer=words, image_seq_length=4,
        chat_template=GEMMA3_TEMPLATE,
    )  # fmt: skip
    return model, processor


def paddleocr_vl() -> tuple[nn.Module, ProcessorMixin]:
    special = ["<|begin_of_sentence|>", "<|IMAGE_START|>", "<|IMAGE_END|>", "<|VIDEO_PLACEHOLDER|>"]
    words = tokenizer(special, bos_token="<s>", eos_token="</s>", image_token="<|IMAGE_PLACEHOLDER|>")
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = transformers.PaddleOCRVLConfig(
        vision_config=dict(**VISION_SIZES), text_config=text_config(
            words, "paddleocr_vl_text", head_dim=8, rope_parameters=rope
        ),
        image_token_id=token_id(words, "<|IMAGE_PLACEHOLDER|>"),
        video_token_id=token_id(words, "<|VIDEO_PLACEHOLDER|>"),
        vision_start_token_id=token_id(words, "<|IMAGE_START|>"),
        vision_end_token_id=token_id(words, "<|IMAGE_END|>"),
    )  # fmt: skip
    processor = transformers.PaddleOCRVLProcessor(
        image_processor=PaddleOCRVLImageProcessorPil(
            patch_size=4, merge_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 32 * 32}
        ),
        tokenizer=words, chat_template=PADDLEOCR_VL_TEMPLATE,
    )  # fmt: skip
    return transformers.PaddleOCRVLForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[], tuple[nn.Module, ProcessorMixin]]] = {
    "llava": llava,
    "llava_next": llava_next,
    "idefics3": idefics3,
    "gemma3": gemma3,
    "paddleocr_vl": paddleocr_vl,
}
END_OF_TURN = {
    "llava": "</s>",
    "llava_next": "</s>",
    "idefics3": "<end_of_utterance>",
    "gemma3": "<end_of_turn>",
    "paddleocr_vl": "</s>",
}


def write_folder(family: str, path: Path, *, seed: int = 0) -> Path:
    """The family's model and processor as `save_pretrained` writes them; returns `path`."""
    return save_folder(FAMILIES[family], END_OF_TURN[family], path, seed=seed)


def save_folder(
    build: Callable[[], tuple[nn.Module, ProcessorMixin]], end_of_turn: str, path: Path, *, seed: int = 0
) -> Path:
    """What `build` makes, as `save_pretrained` writes it; generation stops at `end_of_turn`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = build()
    words: Any = processor.tokenizer
    generation: Any = model.generation_config
    generation.pad_token_id = words.pad_token_id
    generation.bos_token_id = words.bos_token_id
    generation.eos_token_id = token_id(words, end_of_turn)
    saved: Any = model
    saved.save_pretrained(path)
    processor.save_pretrained(path)
    return path
