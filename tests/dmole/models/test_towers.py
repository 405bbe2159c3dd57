# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import transformers
from torch import nn

from dmole.models.declaration import Declaration
from dmole.models.towers import Calls, find_candidates, find_towers, refuse_uncalled
from dmole.models.vision_language import wrap
from tests.kernels.families.tiny import FAMILIES, TEXT_SIZES, made

# Per family: towers, and how many candidates they have, counted by hand in transformers' modeling files.
EXPECTED = {
    "llava": ("model.vision_tower", 12, "model.language_model", 14),
    "llava_next": ("model.vision_tower", 12, "model.language_model", 14),
    "qwen2_5_vl": ("model.visual", 10, "model.language_model", 14),
    "qwen3_vl": ("model.visual", 8, "model.language_model", 14),
    "internvl": ("model.vision_tower", 12, "model.language_model", 14),
    "idefics3": ("model.vision_model", 12, "model.text_model", 14),
    "smolvlm": ("model.vision_model", 12, "model.text_model", 14),
    "gemma3": ("model.vision_tower", 12, "model.language_model", 14),
    "paligemma": ("model.vision_tower", 12, "model.language_model", 14),
    "mistral3": ("model.vision_tower", 14, "model.language_model", 14),
    "mllama": ("model.vision_model", 18, "model.language_model", 14),
    "blip2": ("vision_model", 8, "language_model", 12),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_towers_and_candidates_of_each_family(family: str) -> None:
    vlm = wrap(FAMILIES[family].build())
    vision, vision_count, language, language_count = EXPECTED[family]
    assert vlm.towers == {"vision": vision, "language": language}
    assert {tower: len(names) for tower, names in vlm.candidates.items()} == {
        "vision": vision_count,
        "language": language_count,
    }
    every = [name for names in vlm.candidates.values() for name in names]
    assert all(type(vlm.model.get_submodule(name)) is nn.Linear for name in every)
    unwanted = ("merger", "projector", "embed", "lm_head", "qformer", "connector")
    assert [name for name in every if any(part in name for part in unwanted)] == []


def test_a_stack_of_mergers_is_not_taken_for_the_blocks() -> None:
    """Qwen3-VL's deepstack mergers are a module list of their own, with more weights than these two blocks."""
    model = FAMILIES["qwen3_vl"].build()
    mergers = [n for n, m in model.named_modules() if "deepstack_merger_list" in n and type(m) is nn.Linear]
    assert mergers
    assert not set(mergers) & set(wrap(model).candidates["vision"])


def test_a_declared_tower_that_does_not_exist_is_refused() -> None:
    model = FAMILIES["llava"].build()
    with pytest.raises(ValueError, match=r"declaration.vision: got 'model.vision_towr'.*mean 'model.vision_tower'"):
        wrap(model, declaration=Declaration(vision="model.vision_towr"))
    with pytest.raises(ValueError, match=r"declaration.language: got 'decoder', which the model does not have"):
        wrap(model, declaration=Declaration(language="decoder"))


def test_a_declared_tower_takes_precedence() -> None:
    model = FAMILIES["llava"].build()
    vlm = wrap(model, declaration=Declaration(vision="model.vision_tower.encoder.layers.1", candidates=r".*q_proj"))
    assert vlm.candidates["vision"] == ("model.vision_tower.encoder.layers.1.self_attn.q_proj",)


def test_endings_and_a_regex_choose_candidates() -> None:
    model = FAMILIES["llava"].build()
    endings = wrap(model, declaration=Declaration(candidates=("q_proj", "mlp.fc1")))
    assert endings.candidates["vision"] == tuple(
        f"model.vision_tower.encoder.layers.{i}.{end}" for i in (0, 1) for end in ("self_attn.q_proj", "mlp.fc1")
    )
    assert endings.candidates["language"] == tuple(f"model.language_model.layers.{i}.self_attn.q_proj" for i in (0, 1))
    regex = wrap(model, declaration=Declaration(candidates=r"model\.language_model\..*down_proj"))
    assert regex.candidates == {"language": tuple(f"model.language_model.layers.{i}.mlp.down_proj" for i in (0, 1))}


def test_a_filter_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"candidates: got no nn.Linear that match \['qkv'\] .*declaration.candidates"):
        wrap(FAMILIES["llava"].build(), declaration=Declaration(candidates=("qkv",)))


def test_subclasses_of_linear_are_no_candidates_and_are_named() -> None:
    class Other(nn.Linear):
        pass

    model = FAMILIES["llava"].build()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Other(child.in_features, child.out_features))
    with pytest.raises(ValueError, match=r"candidates: got no nn.Linear in the blocks .*\(its linears are Other\)"):
        wrap(model)


def test_the_out_projection_of_multihead_attention_is_no_candidate() -> None:
    """Its weight is read without a call: an expert there would add exactly 0."""
    model = FAMILIES["llava"].build()
    layer: Any = model.get_submodule("model.vision_tower.encoder.layers.0")
    layer.attention_pool = nn.MultiheadAttention(32, 4)
    assert not [name for name in wrap(model).candidates["vision"] if "out_proj" in name and "pool" in name]


def test_one_tower_is_enough() -> None:
    """Fuyu projects patches straight into its decoder: no vision tower, and nothing to refuse."""
    text = dict(model_type="persimmon", **{k: v for k, v in TEXT_SIZES.items() if k != "num_key_value_heads"})
    model = made(
        transformers.FuyuConfig(
            text_config=text,
            patch_size=4,
            image_size=16,
            **{k: v for k, v in TEXT_SIZES.items() if k != "num_key_value_heads"},
        ),
        "FuyuForCausalLM",
    )
    vlm = wrap(model)
    assert set(vlm.candidates) == {"language"}
    batch = FAMILIES["llava"].batch([], 2).arguments
    assert vlm.model(input_ids=batch["input_ids"]).logits.shape[0] == 2


def test_several_towers_of_one_config_are_refused() -> None:
    model: Any = FAMILIES["llava"].build()
    model.model.second = type(model.model.vision_tower)(model.config.vision_config)
    with pytest.raises(ValueError, match=r"vision: got 2 modules with the vision config.*Set declaration.vision"):
        wrap(model)


def test_a_model_without_a_config_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model: got a Sequential without a config"):
        wrap(nn.Sequential(nn.Linear(2, 2)))


def test_a_candidate_that_no_forward_calls_is_refused() -> None:
    model: Any = FAMILIES["llava"].build()
    layer = model.model.vision_tower.encoder.layers[0]
    layer.spare = nn.Linear(32, 32)
    vlm = wrap(model)
    assert "model.vision_tower.encoder.layers.0.spare" in vlm.candidates["vision"]
    batch = FAMILIES["llava"].batch([0, 1], 2).arguments
    with Calls(model, [name for names in vlm.candidates.values() for name in names]) as calls:
        model(**batch)
    assert calls.missing == ("model.vision_tower.encoder.layers.0.spare",)
    with pytest.raises(ValueError, match=r"candidates: \['model.*spare'\] \(1 of the vision tower\) were not called"):
        refuse_uncalled({"vision": calls.missing})


def test_hooks_that_watch_calls_are_taken_off() -> None:
    model = FAMILIES["llava"].build()
    names = find_candidates(model, find_towers(model, Declaration()), Declaration())["language"]
    with Calls(model, names):
        pass
    assert all(not model.get_submodule(name)._forward_pre_hooks for name in names)


def test_wrapping_freezes_the_model() -> None:
    model = FAMILIES["gemma3"].build().train()
    wrap(model)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
