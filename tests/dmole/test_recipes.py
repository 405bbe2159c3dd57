# SPDX-License-Identifier: Apache-2.0
"""Recipes are whole configurations that any process can rebuild."""

import re

import pytest

from dmole.config import build_config
from dmole.methods import method_names
from dmole.models.vision_language import VisionLanguageModel
from dmole.recipes import ATTENTION, RECIPES, mini_small, paper


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_round_trip(name: str) -> None:
    config = RECIPES[name]()
    assert build_config(config.to_dict()).to_dict() == config.to_dict()


def test_the_demo_is_the_same_stream_with_fewer_samples() -> None:
    demo, full = mini_small(), RECIPES["mini"]()
    assert (demo.stream, demo.model, demo.orders) == (full.stream, full.model, full.orders)
    assert demo.train_samples is not None
    assert set(full.methods) == set(method_names())


def test_papers_candidates_are_the_attention_projections(tiny_model: VisionLanguageModel) -> None:
    config = paper("stream", "model")
    chosen = config.method_settings("dmole").select_candidates(tiny_model.candidates)
    names = {name.rpartition(".")[2] for linears in chosen.values() for name in linears}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "out_proj"}
    assert re.search(ATTENTION, "vision_tower.encoder.layer.3.attention.qkv")
    assert not re.search(ATTENTION, "language_model.layers.0.mlp.gate_proj")
    assert config.training.epochs_of == {"sk_vg": 5, "vizwiz_vqa": 5, "iconqa": 5}
