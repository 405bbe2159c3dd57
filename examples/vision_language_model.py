# SPDX-License-Identifier: Apache-2.0
"""Experts in both towers of a tiny LLaVA and a tiny Qwen2.5-VL; samples have two, no and one image. No downloads.

The rows of a vision tower are images (LLaVA) or patches (Qwen2.5-VL), not samples: `units` says how many images each
sample has. The same call gates training and generation with beams.
"""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import transformers

from dmole_kernels import convert, experts_of, load_experts, save_experts

IMAGE, PAD = 5, 0  # token ids
UNITS = [2, 0, 1]  # images of each sample
GATE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])  # [samples, experts]
NAMES = ["charts", "maps"]
TEXT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, pad_token_id=PAD,
)  # fmt: skip


def llava() -> transformers.PreTrainedModel:
    vision = dict(
        model_type="clip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, image_size=16, patch_size=4, projection_dim=32,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=dict(model_type="llama", **TEXT), image_token_index=IMAGE,
        vision_feature_layer=-1,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_5_vl() -> transformers.PreTrainedModel:
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=4, out_hidden_size=32, patch_size=4,
        spatial_merge_size=2, temporal_patch_size=2, window_size=16, fullatt_block_indexes=[1],
    )  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision, text_config=dict(**TEXT, rope_parameters=rope, bos_token_id=1, eos_token_id=2),
        image_token_id=IMAGE,
        vision_start_token_id=3, vision_end_token_id=4,
    )  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def batch(image_tokens: int) -> dict[str, torch.Tensor]:
    """What a processor gives: ids with the image tokens of each sample, padded on the left as for generation."""
    ids = [[1] + [3, *[IMAGE] * image_tokens, 4] * images + [10, 11, 12 + images] for images in UNITS]
    length = max(map(len, ids))
    padded = torch.tensor([[PAD] * (length - len(row)) + row for row in ids])
    return {"input_ids": padded, "attention_mask": (padded != PAD).long()}


def llava_inputs() -> dict[str, torch.Tensor]:
    return {**batch(16), "pixel_values": torch.randn(sum(UNITS), 3, 16, 16)}


def qwen2_5_vl_inputs() -> dict[str, torch.Tensor]:
    """4 x 4 patches an image, in one flat list. Images of unequal size: units are then their image tokens."""
    ids = batch(4)
    return {
        **ids,
        "pixel_values": torch.randn(sum(UNITS) * 16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * sum(UNITS)),
        "mm_token_type_ids": (ids["input_ids"] == IMAGE).int(),
    }


def run(name: str, build: Callable[[], Any], inputs: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(1)
    model = build().eval()
    experts = convert(model, r".*\.(q_proj|k_proj|v_proj|qkv)")  # in both towers; the rest is frozen
    experts.add("charts", rank=8)
    experts.add("maps", rank=4)
    optimizer = torch.optim.AdamW(experts.parameters(), lr=1e-2)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < 10, -100)
    losses = []
    for _ in range(30):
        with experts.use(GATE, NAMES, units=UNITS):
            loss = model(**inputs, labels=labels).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"{name}: {len(experts.layers)} layers, loss {losses[0]:.2f} -> {losses[-1]:.2f}")

    beams = dict(max_new_tokens=4, num_beams=2, do_sample=False, eos_token_id=None)
    with experts.use(GATE, NAMES, units=UNITS):
        answers = model.generate(**inputs, **beams)
    with tempfile.TemporaryDirectory() as folder:
        save_experts(model, folder)
        torch.manual_seed(1)
        other = build().eval()
        convert(other, list(experts.layers))
        load_experts(other, folder)
    with experts_of(other).use(GATE, NAMES, units=UNITS):
        assert torch.equal(other.generate(**inputs, **beams), answers)
    print(f"{name}: two beams, loaded again: {answers[:, inputs['input_ids'].shape[1] :].tolist()}")


if __name__ == "__main__":
    torch.manual_seed(0)
    run("llava", llava, llava_inputs())
    run("qwen2_5_vl", qwen2_5_vl, qwen2_5_vl_inputs())
