# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of transformers' vision-language families; batches whose samples own unequal numbers of images.

A builder gives the model and, for a list `owners` (the sample of each image, in order), the keyword arguments of its
forward and the vision tower's `units`. Sizes are a few kilobytes; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

IMAGE, PAD, TEXT = 5, 0, 40  # ids of the image token and of padding; text is drawn from 10 to 39
TEXT_SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, max_position_embeddings=512, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
VIT_SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4,
    num_channels=3,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Batch:
    arguments: dict[str, Any]
    units: list[int]  # of the vision tower


@dataclass(frozen=True, kw_only=True)
class Family:
    build: Callable[[], nn.Module]
    batch: Callable[[Sequence[int], int], Batch]  # owners, samples
    vision: str  # a regex of the vision tower's candidate linears
    language: str


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(owners: Sequence[int], samples: int, tokens: int | Sequence[int], *, image: int = IMAGE) -> dict[str, Tensor]:
    """ids with `tokens` image tokens for every image of a sample (or tokens[i] for image i), right-padded."""
    each = [tokens] * len(owners) if isinstance(tokens, int) else list(tokens)
    generator = torch.Generator().manual_seed(7)
    rows = []
    for s in range(samples):
        row = [1]
        for image_number, owner in enumerate(owners):
            if owner == s:
                row += [3] + [image] * each[image_number] + [4]
        row += torch.randint(10, TEXT, (4 + s,), generator=generator).tolist()
        rows.append(row)
    length = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def per_sample(owners: Sequence[int], samples: int) -> list[int]:
    return [sum(owner == s for owner in owners) for s in range(samples)]


def made(config: Any, name: str) -> nn.Module:
    """The model class with weights large enough that an expert shows in the logits."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    model.set_attn_implementation("eager")
    return model.eval()  # type: ignore[no-any-return]


def clip_like(kind: str) -> dict[str, Any]:
    return dict(model_type=kind, **VIT_SIZES)


def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config=dict(model_type="clip_vision_model", projection_dim=32, **VIT_SIZES),
        text_config=dict(model_type="llama", **TEXT_SIZES), image_token_index=IMAGE,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    return made(config, "LlavaForConditionalGeneration")


def flat_images(tokens: int, size: int = 16) -> Callable[[Sequence[int], int], Batch]:
    """pixel_values [images, 3, size, size], every image `tokens` image tokens: one unit an image."""

    def batch(owners: Sequence[int], samples: int) -> Batch:
        arguments = {**text(owners, samples, tokens), "pixel_values": drawn(len(owners), 3, size, size)}
        return Batch(arguments=arguments, units=per_sample(owners, samples))

    return batch


def llava_next() -> nn.Module:
    config = transformers.LlavaNextConfig(
        vision_config=dict(model_type="clip_vision_model", projection_dim=32, **VIT_SIZES),
        text_config=dict(model_type="llama", **TEXT_SIZES), image_token_index=IMAGE, image_grid_pinpoints=[[16, 32]],
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    return made(config, "LlavaNextForConditionalGeneration")


def llava_next_batch(owners: Sequence[int], samples: int) -> Batch:
    """Three tiles an image (the whole and two parts); the rows of the tower are tiles."""
    # 16 tokens of the whole image, and 4 rows of 8 with a newline each.
    tokens = 16 + 4 * (8 + 1)
    arguments = {
        **text(owners, samples, tokens),
        "pixel_values": drawn(len(owners), 3, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 32]] * len(owners)),
    }
    return Batch(arguments=arguments, units=[3 * n for n in per_sample(owners, samples)])


def qwen(name: str, **vision: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        text_config = {k: v for k, v in TEXT_SIZES.items() if k not in ("bos_token_id", "eos_token_id")}
        rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
        extra = {"head_dim": 8} if name == "Qwen3VL" else {}
        config = getattr(transformers, f"{name}Config")(
            vision_config=dict(
                patch_size=4, spatial_merge_size=2, temporal_patch_size=2, in_channels=3, num_heads=4, depth=2,
                hidden_size=32, intermediate_size=48, out_hidden_size=32, **vision,
            ),
            text_config=dict(**text_config, rope_parameters=rope, **extra), image_token_id=IMAGE,
            video_token_id=6, vision_start_token_id=3, vision_end_token_id=4,
        )  # fmt: skip
        return made(config, f"{name}ForConditionalGeneration")

    return build


def qwen_batch(owners: Sequence[int], samples: int) -> Batch:
    """Images of unequal size, as flat patches of the whole batch: the units are image tokens."""
    grids = [[1, 4, 4 + 4 * (i % 2)] for i in range(len(owners))]
    patches = [t * h * w for t, h, w in grids]
    tokens = [n // 4 for n in patches]
    ids = text(owners, samples, tokens)
    units = [sum(n for n, owner in zip(tokens, owners, strict=True) if owner == s) for s in range(samples)]
    arguments = {
        **ids,
        "pixel_values": drawn(sum(patches), 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor(grids),
        "mm_token_type_ids": (ids["input_ids"] == IMAGE).int(),
    }
    return Batch(arguments=arguments, units=units)


def internvl() -> nn.Module:
    config = transformers.InternVLConfig(
        vision_config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=[16, 16],
            patch_size=[4, 4], num_channels=3, layer_scale_init_value=1.0,
        ),
        text_config=dict(model_type="qwen2", **TEXT_SIZES), image_token_id=IMAGE, image_seq_length=4,
    )  # fmt: skip
    return made(config, "InternVLForConditionalGeneration")


def idefics3(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = getattr(transformers, f"{name}Config")(
            vision_config=dict(**VIT_SIZES), text_config=dict(model_type="llama", **TEXT_SIZES), image_token_id=IMAGE,
            scale_factor=2, pad_token_id=PAD,
        )  # fmt: skip
        return made(config, f"{name}ForConditionalGeneration")

    return build


def idefics3_batch(owners: Sequence[int], samples: int) -> Batch:
    """pixel_values [samples, most images, ...], padded with black images that the tower leaves out."""
    counts = per_sample(owners, samples)
    pixels = torch.zeros(samples, max(counts), 3, 16, 16)
    images, place = drawn(len(owners), 3, 16, 16), [0] * samples
    for image, owner in zip(images, owners, strict=True):
        pixels[owner, place[owner]] = image
        place[owner] += 1
    return Batch(arguments={**text(owners, samples, 4), "pixel_values": pixels}, units=counts)


def gemma3() -> nn.Module:
    sizes = {k: v for k, v in TEXT_SIZES.items()}
    config = transformers.Gemma3Config(
        vision_config=dict(**VIT_SIZES), text_config=dict(**sizes, head_dim=8, sliding_window=64),
        mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=3, eoi_token_index=4,
    )  # fmt: skip
    model = made(config, "Gemma3ForConditionalGeneration")
    # Zero as it comes: no image would reach a logit.
    nn.init.normal_(model.get_parameter("model.multi_modal_projector.mm_input_projection_weight"), std=0.2)
    return model


def with_token_types(batch: Callable[[Sequence[int], int], Batch]) -> Callable[[Sequence[int], int], Batch]:
    def build(owners: Sequence[int], samples: int) -> Batch:
        plain = batch(owners, samples)
        types = (plain.arguments["input_ids"] == IMAGE).long()
        return Batch(arguments={**plain.arguments, "token_type_ids": types}, units=plain.units)

    return build


def paligemma() -> nn.Module:
    config = transformers.PaliGemmaConfig(
        vision_config=dict(model_type="siglip_vision_model", projection_dim=32, **VIT_SIZES),
        text_config=dict(model_type="gemma", head_dim=8, **TEXT_SIZES), image_token_index=IMAGE, projection_dim=32,
        hidden_size=32,
    )  # fmt: skip
    return made(config, "PaliGemmaForConditionalGeneration")


def mistral3() -> nn.Module:
    config = transformers.Mistral3Config(
        vision_config=dict(model_type="pixtral", head_dim=8, **VIT_SIZES),
        text_config=dict(model_type="mistral", head_dim=8, **TEXT_SIZES), image_token_index=IMAGE,
        spatial_merge_size=2, vision_feature_layer=-1,
    )  # fmt: skip
    return made(config, "Mistral3ForConditionalGeneration")


def mistral3_batch(owners: Sequence[int], samples: int) -> Batch:
    """Images of unequal size in one row of patches [1, patches, ...]: the units are image tokens."""
    sizes = [[16, 16] if i % 2 else [16, 8] for i in range(len(owners))]
    tokens = [h * w // 64 for h, w in sizes]
    arguments = {
        **text(owners, samples, tokens),
        "pixel_values": drawn(len(owners), 3, 16, 16),
        "image_sizes": torch.tensor(sizes),
    }
    units = [sum(n for n, owner in zip(tokens, owners, strict=True) if owner == s) for s in range(samples)]
    return Batch(arguments=arguments, units=units)


def mllama() -> nn.Module:
    config = transformers.MllamaConfig(
        vision_config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_global_layers=1, attention_heads=4,
            image_size=16, patch_size=4, max_num_tiles=2, supported_aspect_ratios=[[1, 1], [1, 2]],
            intermediate_layers_indices=[0], vision_output_dim=64,
        ),
        text_config=dict(**TEXT_SIZES, cross_attention_layers=[1]), image_token_index=IMAGE,
    )  # fmt: skip
    model = made(config, "MllamaForConditionalGeneration")
    for name, parameter in model.named_parameters():
        if name.endswith(("gate", "gate_attn", "gate_ffn", "cross_attn_attn_gate", "cross_attn_mlp_gate")):
            nn.init.ones_(parameter)  # zero as they come: no image would reach a logit
    return model


def mllama_batch(owners: Sequence[int], samples: int) -> Batch:
    """pixel_values [samples, most images, tiles, ...]: padded, so each sample owns as many rows of the tower."""
    counts = per_sample(owners, samples)
    most = max(counts)
    pixels = torch.zeros(samples, most, 2, 3, 16, 16)
    ratios = torch.zeros(samples, most, dtype=torch.long)
    tiles = torch.zeros(samples, most, 2, dtype=torch.long)
    images, place = drawn(len(owners), 2, 3, 16, 16), [0] * samples
    for image, owner in zip(images, owners, strict=True):
        pixels[owner, place[owner]] = image
        ratios[owner, place[owner]] = 2
        tiles[owner, place[owner]] = 1
        place[owner] += 1
    ids = text(owners, samples, 1)
    length = ids["input_ids"].shape[1]
    cross = torch.zeros(samples, length, most, 2, dtype=torch.long)
    for s, count in enumerate(counts):
        cross[s, :, :count] = 1
    arguments = {
        **ids, "pixel_values": pixels, "aspect_ratio_ids": ratios, "aspect_ratio_mask": tiles,
        "cross_attention_mask": cross,
    }  # fmt: skip
    return Batch(arguments=arguments, units=[1] * samples)


def blip2() -> nn.Module:
    config = transformers.Blip2Config(
        vision_config=dict(**VIT_SIZES),
        qformer_config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, encoder_hidden_size=32,
            vocab_size=64, cross_attention_frequency=1,
        ),
        text_config=dict(
            model_type="opt", hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2,
            num_attention_heads=4, vocab_size=64, max_position_embeddings=128, pad_token_id=PAD, bos_token_id=1,
            eos_token_id=2,
        ),
        num_query_tokens=4, image_token_index=IMAGE,
    )  # fmt: skip
    return made(config, "Blip2ForConditionalGeneration")


# The linears of the towers' stacks of blocks: no merger, projector, pooling head or output head.
VISION_LINEARS = r".*(vision|visual).*(layers?|blocks)\.\d+\..*"
LANGUAGE_LINEARS = r"(?!.*(vision|visual|qformer)).*layers\.\d+\..*"


def family(build: Callable[[], nn.Module], batch: Callable[[Sequence[int], int], Batch]) -> Family:
    return Family(build=build, batch=batch, vision=VISION_LINEARS, language=LANGUAGE_LINEARS)


FAMILIES: dict[str, Family] = {
    "llava": family(llava, flat_images(16)),
    "llava_next": family(llava_next, llava_next_batch),
    "qwen2_5_vl": family(qwen("Qwen2_5_VL", fullatt_block_indexes=[1], window_size=16), qwen_batch),
    "qwen3_vl": family(qwen("Qwen3VL", num_position_embeddings=64, deepstack_visual_indexes=[0]), qwen_batch),
    "internvl": family(internvl, flat_images(4)),
    "idefics3": family(idefics3("Idefics3"), idefics3_batch),
    "smolvlm": family(idefics3("SmolVLM"), idefics3_batch),
    "gemma3": family(gemma3, with_token_types(flat_images(4))),
    "paligemma": family(paligemma, with_token_types(flat_images(16))),
    "mistral3": family(mistral3, mistral3_batch),
    "mllama": family(mllama, mllama_batch),
    "blip2": family(blip2, flat_images(4)),
}
