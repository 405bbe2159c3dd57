# SPDX-License-Identifier: Apache-2.0
"""Experts in both towers of vision-language models whose samples have two images, none and one.

    python examples/vision_language_model.py

The models are tiny random ones of transformers' own classes, so nothing is downloaded; `from_pretrained` models are
converted by the same lines.
"""

import tempfile

import torch
from torch import nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from dmole_kernels import convert, load_experts, save_experts

IMAGE = 5
IMAGES_OF_SAMPLE = [2, 0, 1]
TEXT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def batch(tokens: int) -> dict[str, torch.Tensor]:
    """Three prompts, padded on the left as `generate` wants them, with `tokens` image tokens for every image."""
    rows = [([3] + [IMAGE] * tokens + [4]) * images + [10, 11, 12] for images in IMAGES_OF_SAMPLE]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def llava() -> tuple[nn.Module, dict[str, torch.Tensor], list[int]]:
    vision = dict(
        model_type="clip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, image_size=16, patch_size=4, projection_dim=32,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=dict(model_type="llama", **TEXT), image_token_index=IMAGE,
        vision_feature_layer=-1,
    )  # fmt: skip
    # All images have as many rows in the tower: the units are numbers of images.
    return LlavaForConditionalGeneration(config), batch(16) | {"pixel_values": torch.randn(3, 3, 16, 16)}, [2, 0, 1]


def qwen() -> tuple[nn.Module, dict[str, torch.Tensor], list[int]]:
    vision = dict(
        patch_size=4, spatial_merge_size=2, temporal_patch_size=2, num_heads=4, depth=2, hidden_size=32,
        intermediate_size=48, out_hidden_size=32, fullatt_block_indexes=[1], window_size=16,
    )  # fmt: skip
    text = {key: value for key, value in TEXT.items() if key not in ("bos_token_id", "eos_token_id")}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        vision_config=vision, text_config=dict(**text, rope_parameters=rope), image_token_id=IMAGE, video_token_id=6,
        vision_start_token_id=3, vision_end_token_id=4,
    )  # fmt: skip
    inputs = batch(4)
    inputs |= {
        "pixel_values": torch.randn(3 * 16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 3),
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE).int(),
    }
    # The tower's rows are flat patches of the whole batch: the units are image tokens.
    return Qwen2_5_VLForConditionalGeneration(config), inputs, [8, 0, 4]


for make in (llava, qwen):
    torch.manual_seed(0)
    model, inputs, units = make()
    model.eval()
    experts = convert(model)  # every linear of both towers but the output head
    for name in ("captions", "charts"):
        experts.add(name, rank=4)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    gate = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    with torch.no_grad(), experts.use(gate, ["captions", "charts"], units=units):
        logits = model(**inputs).logits
        text = model.generate(**inputs, max_new_tokens=3, num_beams=2, do_sample=False)
    with torch.no_grad(), experts.use(gate[:1].expand(3, 2), ["captions", "charts"], units=units):
        alone = model(**inputs).logits
    same = torch.allclose(logits[0], alone[0], atol=1e-4)
    print(f"{type(model).__name__}: sample 0 has its own expert beside any others: {same}; text {tuple(text.shape)}")
    with tempfile.TemporaryDirectory() as folder:
        save_experts(model, folder)
        kept = [parameter.detach().clone() for parameter in experts.parameters()]
        for parameter in experts.parameters():
            nn.init.zeros_(parameter)
        load_experts(model, folder)
        print("loaded:", all(torch.equal(p, k) for p, k in zip(experts.parameters(), kept, strict=True)))
