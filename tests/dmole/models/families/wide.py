# SPDX-License-Identifier: Apache-2.0
"""More families for the long test: tiny random models, and batches made by hand as in `tests.kernels.families.tiny`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import nn

from tests.kernels.families.tiny import (
    IMAGE,
    PAD,
    TEXT_SIZES,
    VIT_SIZES,
    Batch,
    Family,
    drawn,
    family,
    flat_images,
    idefics3_batch,
    llava_next_batch,
    made,
    mistral3_batch,
    per_sample,
    qwen_batch,
    text,
)  # fmt: skip

Builder = Callable[[], nn.Module]
QWEN_TEXT = {k: v for k, v in TEXT_SIZES.items() if k not in ("bos_token_id", "eos_token_id")}
MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
IDS = dict(image_token_id=IMAGE, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4)
GRID_VISION = dict(patch_size=4, spatial_merge_size=2, temporal_patch_size=2, in_channels=3, num_heads=4, depth=2)
CLIP = dict(model_type="clip_vision_model", projection_dim=32, **VIT_SIZES)
SIGLIP = dict(model_type="siglip_vision_model", **VIT_SIZES)
LLAMA = dict(model_type="llama", **TEXT_SIZES)
QWEN2 = dict(model_type="qwen2", **TEXT_SIZES)


def build(name: str, **settings: Any) -> Builder:
    return lambda: made(getattr(transformers, f"{name}Config")(**settings), f"{name}ForConditionalGeneration")


def onevision_batch(owners: Sequence[int], samples: int) -> Batch:
    """Three tiles an image: 16 tokens of the whole, 4 rows of 8 with a newline each."""
    arguments = {
        **text(owners, samples, 16 + 4 * 9),
        "pixel_values": drawn(len(owners), 3, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 32]] * len(owners)),
    }
    return Batch(arguments=arguments, units=[3 * n for n in per_sample(owners, samples)])


def video_llama_3_batch(owners: Sequence[int], samples: int) -> Batch:
    plain = qwen_batch(owners, samples)
    arguments = {name: value for name, value in plain.arguments.items() if name != "mm_token_type_ids"}
    arguments["pixel_values"] = drawn(len(arguments["pixel_values"]), 3 * 4 * 4)
    arguments["image_merge_sizes"] = torch.tensor([2] * len(owners))
    return Batch(arguments=arguments, units=plain.units)


def paddleocr_vl_batch(owners: Sequence[int], samples: int) -> Batch:
    plain = qwen_batch(owners, samples)
    pixels = drawn(len(plain.arguments["pixel_values"]), 3, 4, 4)
    return Batch(arguments={**plain.arguments, "pixel_values": pixels}, units=plain.units)


def lfm2_vl_batch(owners: Sequence[int], samples: int) -> Batch:
    """Images of unequal size, each padded to 32 patches: rows are images, and tokens are not in proportion to them."""
    shapes = [[4, 4 + 4 * (i % 2)] for i in range(len(owners))]
    mask = torch.zeros(len(owners), 32, dtype=torch.long)
    for row, (h, w) in zip(mask, shapes, strict=True):
        row[: h * w] = 1
    arguments = {
        **text(owners, samples, [h * w // 4 for h, w in shapes]),
        "pixel_values": drawn(len(owners), 32, 3 * 4 * 4),
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor(shapes),
    }
    return Batch(arguments=arguments, units=per_sample(owners, samples))


def perception_lm_batch(owners: Sequence[int], samples: int) -> Batch:
    arguments = {**text(owners, samples, 16), "pixel_values": drawn(len(owners), 1, 3, 16, 16)}
    return Batch(arguments=arguments, units=per_sample(owners, samples))


def fuyu() -> nn.Module:
    sizes = {k: v for k, v in TEXT_SIZES.items() if k != "num_key_value_heads"}
    config = transformers.FuyuConfig(
        text_config=dict(model_type="persimmon", **sizes), patch_size=4, image_size=16, image_token_id=IMAGE
    )
    return made(config, "FuyuForCausalLM")


def fuyu_batch(owners: Sequence[int], samples: int) -> Batch:
    arguments = {**text(owners, samples, 16), "image_patches": drawn(len(owners), 16, 3 * 4 * 4)}
    return Batch(arguments=arguments, units=per_sample(owners, samples))


def chameleon() -> nn.Module:
    config = transformers.ChameleonConfig(
        **TEXT_SIZES,
        vq_config=dict(embed_dim=8, num_embeddings=16, latent_channels=8, resolution=16, base_channels=32,
                       channel_multiplier=[1, 2], num_res_blocks=1),
        vocabulary_map={"<image>": IMAGE, **{"IMGIMG" + "".join(chr(65 + int(digit)) for digit in str(i)) + "Z": 44 + i
                                                  for i in range(16)}},
    )  # fmt: skip
    return made(config, "ChameleonForConditionalGeneration")


def instructblip_batch(owners: Sequence[int], samples: int) -> Batch:
    """The Q-Former reads one question for each image."""
    plain = flat_images(4)(owners, samples)
    question = dict(
        qformer_input_ids=torch.full((len(owners), 3), 9), qformer_attention_mask=torch.ones(len(owners), 3).long()
    )
    return Batch(arguments={**plain.arguments, **question}, units=plain.units)


def with_normal(builder: Builder, *, also: str = "", std: float = 0.2) -> Builder:
    """Draws weights again that come so small that no image reaches a logit, and those whose names end in `also`."""

    def again() -> nn.Module:
        model = builder()
        for name, parameter in model.named_parameters():
            if parameter.abs().max() < 1e-6 or (also and name.endswith(also)):
                nn.init.normal_(parameter, std=std)
        return model

    return again


def omni_batch(owners: Sequence[int], samples: int) -> Batch:
    plain = qwen_batch(owners, samples)
    arguments = {name: value for name, value in plain.arguments.items() if name != "mm_token_type_ids"}
    return Batch(arguments=arguments, units=plain.units)


def ernie_batch(owners: Sequence[int], samples: int) -> Batch:
    plain = qwen_batch(owners, samples)
    pixels = drawn(len(plain.arguments["pixel_values"]), 3 * 4 * 4)
    kinds = (plain.arguments["input_ids"] == IMAGE).int()
    return Batch(
        arguments={**plain.arguments, "pixel_values": pixels, "moe_mm_token_type_ids": kinds}, units=plain.units
    )


def gemma4_batch(owners: Sequence[int], samples: int) -> Batch:
    """Images of unequal size as patches, padded to 32 with position -1: rows are images."""
    shapes = [(4, 4 + 4 * (i % 2)) for i in range(len(owners))]
    positions = torch.full((len(owners), 32, 2), -1)
    for row, (h, w) in zip(positions, shapes, strict=True):
        row[: h * w] = torch.tensor([[x, y] for y in range(h) for x in range(w)])
    ids = text(owners, samples, [h * w // 4 for h, w in shapes])
    arguments = {
        **ids, "pixel_values": drawn(len(owners), 32, 3 * 4 * 4), "image_position_ids": positions,
        "mm_token_type_ids": (ids["input_ids"] == IMAGE).long(),
    }  # fmt: skip
    return Batch(arguments=arguments, units=per_sample(owners, samples))


def idefics() -> nn.Module:
    sizes = {k: v for k, v in TEXT_SIZES.items() if k != "num_key_value_heads"}
    config = transformers.IdeficsConfig(
        **sizes, vision_config=dict(embed_dim=32, image_size=16, intermediate_size=48, patch_size=4,
                                    num_hidden_layers=2, num_attention_heads=4),
        alpha_initializer="ones", cross_layer_interval=1, tie_word_embeddings=False,
    )  # fmt: skip
    return made(config, "IdeficsForVisionText2Text")


def idefics_batch(owners: Sequence[int], samples: int) -> Batch:
    """Padded to the most images a sample has, also for the samples without one."""
    plain = idefics3_batch(owners, samples)
    counts = per_sample(owners, samples)
    mask = torch.zeros(*plain.arguments["input_ids"].shape, max(counts), dtype=torch.long)
    for s, count in enumerate(counts):
        mask[s, :, :count] = 1
    return Batch(arguments={**plain.arguments, "image_attention_mask": mask}, units=[1] * samples)


GLM_IDS: dict[str, Any] = dict(
    image_token_id=IMAGE, video_token_id=6, image_start_token_id=3, image_end_token_id=4, video_start_token_id=7,
    video_end_token_id=8,
)  # fmt: skip
BLIP_PARTS: dict[str, Any] = dict(
    vision_config=dict(initializer_range=0.02, **VIT_SIZES),
    qformer_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                        encoder_hidden_size=32, vocab_size=64, cross_attention_frequency=1),
    text_config=dict(model_type="opt", hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2,
                     num_attention_heads=4, vocab_size=64, max_position_embeddings=128, pad_token_id=PAD,
                     bos_token_id=1, eos_token_id=2),
    num_query_tokens=4, image_token_index=IMAGE,
)  # fmt: skip

WIDE: dict[str, Family] = {
    "vipllava": family(build("VipLlava", vision_config=CLIP, text_config=LLAMA, image_token_index=IMAGE,
                             vision_feature_layer=[-1, -2]), flat_images(16)),
    "aya_vision": family(build("AyaVision", vision_config=SIGLIP, image_token_index=IMAGE, text_config=dict(
        model_type="cohere2", **TEXT_SIZES)), flat_images(4)),
    "cohere2_vision": family(build("Cohere2Vision", vision_config=SIGLIP, image_token_id=IMAGE,
                                   alignment_intermediate_size=64, text_config=dict(
                                       model_type="cohere2", **TEXT_SIZES)), flat_images(4)),
    "got_ocr2": family(with_normal(build("GotOcr2", image_token_index=IMAGE, text_config=QWEN2, vision_config=dict(
        hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=4,
        window_size=4, global_attn_indexes=[1], mlp_dim=48, initializer_range=0.02))), flat_images(16, 64)),
    "idefics2": family(with_normal(build("Idefics2", vision_config=VIT_SIZES, image_token_id=IMAGE, text_config=dict(
        model_type="mistral", **TEXT_SIZES), perceiver_config=dict(
            hidden_size=32, resampler_n_latents=4, resampler_depth=1, resampler_n_heads=4, resampler_head_dim=8,
            num_key_value_heads=2)), also="modality_projection.down_proj.weight"), idefics3_batch),
    "instructblip": family(with_normal(build("InstructBlip", **BLIP_PARTS)), instructblip_batch),
    "llava_onevision": family(build("LlavaOnevision", vision_config=SIGLIP, text_config=QWEN2,
                                    image_token_index=IMAGE, video_token_index=6, image_grid_pinpoints=[[16, 32]]),
                              onevision_batch),
    "llava_next_video": family(build("LlavaNextVideo", vision_config=CLIP, text_config=LLAMA, image_token_index=IMAGE,
                                     video_token_index=6, image_grid_pinpoints=[[16, 32]], vision_feature_layer=-1,
                                     vision_feature_select_strategy="default"), llava_next_batch),
    "qwen2_vl": family(build("Qwen2VL", text_config=dict(**QWEN_TEXT, rope_parameters=MROPE), **IDS, vision_config=dict(
        **GRID_VISION, embed_dim=32, hidden_size=32, mlp_ratio=2)), qwen_batch),
    "qwen3_vl_moe": family(build("Qwen3VLMoe", **IDS, vision_config=dict(
        **GRID_VISION, hidden_size=32, intermediate_size=48, out_hidden_size=32, num_position_embeddings=64,
        deepstack_visual_indexes=[0]), text_config=dict(
            **QWEN_TEXT, rope_parameters=MROPE, head_dim=8, moe_intermediate_size=16, num_experts=4,
            num_experts_per_tok=2)), qwen_batch),
    "qwen3_5": family(build("Qwen3_5", **IDS, vision_config=dict(
        **GRID_VISION, hidden_size=32, intermediate_size=48, out_hidden_size=32, num_position_embeddings=64),
        text_config=dict(**QWEN_TEXT, head_dim=8, layer_types=["linear_attention", "full_attention"],
                         linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
                         linear_num_value_heads=4, rope_parameters={
                             **MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0})), qwen_batch),
    "glm4v": family(build("Glm4v", image_token_id=IMAGE, video_token_id=6, image_start_token_id=3,
                          image_end_token_id=4, video_start_token_id=7, video_end_token_id=8, vision_config=dict(
                              **GRID_VISION, hidden_size=32, intermediate_size=48, out_hidden_size=32, image_size=16),
                          text_config=dict(**QWEN_TEXT, rope_parameters=MROPE)), qwen_batch),
    "glm_ocr": family(build("GlmOcr", image_token_id=IMAGE, video_token_id=6, image_start_token_id=3,
                            image_end_token_id=4, video_start_token_id=7, video_end_token_id=8, vision_config=dict(
                                **GRID_VISION, hidden_size=32, intermediate_size=48, out_hidden_size=32,
                                image_size=16),
                            text_config=dict(**QWEN_TEXT, head_dim=8, rope_parameters=MROPE)), qwen_batch),
    "video_llama_3": family(build("VideoLlama3", text_config=QWEN2, image_token_id=IMAGE, video_token_id=6,
                                  vision_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                                     num_attention_heads=4, patch_size=4)), video_llama_3_batch),
    "paddleocr_vl": family(build("PaddleOCRVL", **IDS, vision_config=dict(**VIT_SIZES), text_config=dict(
        **TEXT_SIZES, head_dim=8, rope_parameters=MROPE)), paddleocr_vl_batch),
    "lfm2_vl": family(build("Lfm2Vl", image_token_id=IMAGE, projector_hidden_size=32, vision_config=dict(
        model_type="siglip2_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, patch_size=4, num_patches=64), text_config=dict(
            model_type="lfm2", **TEXT_SIZES, layer_types=["conv", "full_attention"])), lfm2_vl_batch),
    "lighton_ocr": family(build("LightOnOcr", image_token_id=IMAGE, vision_config=dict(
        model_type="pixtral", head_dim=8, **VIT_SIZES), text_config=dict(
            model_type="qwen3", head_dim=8, **TEXT_SIZES)), mistral3_batch),
    "llama4": family(build("Llama4", image_token_index=IMAGE, boi_token_index=3, eoi_token_index=4, vision_config=dict(
        **{**VIT_SIZES, "intermediate_size": 128}, vision_output_dim=32, projector_input_dim=32,
            projector_output_dim=32), text_config=dict(
            **TEXT_SIZES, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=128)),
        flat_images(4)),
    "ovis2": family(build("Ovis2", image_token_id=IMAGE, visual_indicator_token_ids=[50, 51, 52, 53, 54],
                          vocab_size=64, hidden_size=32, text_config=QWEN2, vision_config=dict(
                              **VIT_SIZES, vocab_size=24, hidden_stride=1)), flat_images(16)),
    "fuyu": family(fuyu, fuyu_batch),
    "chameleon": family(chameleon, flat_images(64)),
    "deepseek_vl": family(build("DeepseekVL", image_token_id=IMAGE, text_config=LLAMA, vision_config=SIGLIP),
                          flat_images(16)),
    "aria": family(build("Aria", image_token_index=IMAGE, projector_patch_to_query_dict={"16": 4}, vision_config=dict(
        model_type="idefics3_vision", **VIT_SIZES), text_config=dict(
            **TEXT_SIZES, moe_num_experts=2, moe_topk=1, moe_num_shared_experts=1)), flat_images(4)),
    "glm46v": family(build("Glm46V", **GLM_IDS, vision_config=dict(
        model_type="glm4v_vision", **GRID_VISION, hidden_size=32, intermediate_size=48, out_hidden_size=32,
        image_size=16), text_config=dict(model_type="glm4v_text", **QWEN_TEXT, rope_parameters=MROPE)), qwen_batch),
    "glm4v_moe": family(build("Glm4vMoe", **GLM_IDS, vision_config=dict(
        **GRID_VISION, hidden_size=32, intermediate_size=48, out_hidden_size=32, image_size=16), text_config=dict(
            **QWEN_TEXT, rope_parameters={**MROPE, "partial_rotary_factor": 1.0}, moe_intermediate_size=16,
                num_experts_per_tok=2, n_routed_experts=4)),
        qwen_batch),
    "qwen3_5_moe": family(build("Qwen3_5Moe", **IDS, vision_config=dict(
        **GRID_VISION, hidden_size=32, intermediate_size=48, out_hidden_size=32, num_position_embeddings=64),
        text_config=dict(**{k: v for k, v in QWEN_TEXT.items() if k != "intermediate_size"}, head_dim=8,
                         layer_types=["linear_attention", "full_attention"], linear_key_head_dim=8,
                         linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
                         moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts_per_tok=2,
                         num_experts=4, rope_parameters={**MROPE, "partial_rotary_factor": 1.0})), qwen_batch),
    "qwen2_5_omni_thinker": family(build(
        "Qwen2_5OmniThinker", audio_config=dict(encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=48,
                                                d_model=32, output_dim=32, num_mel_bins=8, max_source_positions=16),
        vision_config=dict(**GRID_VISION, hidden_size=32, intermediate_size=48, out_hidden_size=32,
                           fullatt_block_indexes=[1], window_size=16),
        text_config=dict(**QWEN_TEXT, rope_parameters=MROPE), image_token_index=IMAGE, video_token_index=6,
        audio_token_index=7, vision_start_token_id=3, vision_end_token_id=4, audio_start_token_id=8,
            audio_end_token_id=9, user_token_id=45), omni_batch),
    "ernie4_5_vl_moe": family(build("Ernie4_5_VLMoe", **GLM_IDS, vision_config=dict(
        patch_size=4, spatial_merge_size=2, in_channels=3, num_heads=4, depth=2, hidden_size=32, intermediate_size=48,
        temporal_merge_size=2), text_config=dict(
            **QWEN_TEXT, moe_intermediate_size=[16, 16], moe_k=2, moe_num_experts=4, moe_num_shared_experts=1,
            mlp_layer_types=["dense", "sparse"], rope_parameters={**MROPE, "mrope_section": [1, 1, 2]})), ernie_batch),
    "exaone4_5": family(build("Exaone4_5_", image_token_id=IMAGE, video_token_id=6, vision_config=dict(
        **GRID_VISION, hidden_size=32, intermediate_size=48, out_hidden_size=32, fullatt_block_indexes=[1],
        window_size=16, num_key_value_heads=2), text_config=dict(model_type="exaone4", **TEXT_SIZES)), omni_batch),
    "gemma4": family(build("Gemma4", image_token_id=IMAGE, boi_token_id=3, eoi_token_id=4, video_token_id=6,
                           audio_token_id=7, audio_config=None, vision_config=dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        head_dim=8, patch_size=4, pooling_kernel_size=2, position_embedding_size=64), text_config=dict(
            **TEXT_SIZES, head_dim=8, sliding_window=64, layer_types=["sliding_attention", "full_attention"],
            vocab_size_per_layer_input=64, hidden_size_per_layer_input=8)), gemma4_batch),
    "idefics": family(idefics, idefics_batch),
    "florence2": family(build(
        "Florence2", image_token_id=IMAGE, vision_config=dict(
            depths=[1, 1, 1, 1], patch_size=[7, 3, 3, 3], patch_stride=[4, 2, 2, 2], patch_padding=[3, 1, 1, 1],
            patch_prenorm=[False, True, True, True], embed_dim=[16, 16, 32, 32], num_heads=[4, 4, 4, 4],
            num_groups=[4, 4, 4, 4], window_size=2, projection_dim=32, max_position_embeddings=8,
            max_temporal_embeddings=4),
        text_config=dict(model_type="bart", d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                         decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=64,
                         max_position_embeddings=128, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
                         decoder_start_token_id=2)), flat_images(5, 64)),
}  # fmt: skip
