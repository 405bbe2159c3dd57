# SPDX-License-Identifier: Apache-2.0
"""Recipes are whole configurations that any process can rebuild."""

import re

import pytest

from dmole.config import build_config
from dmole.config_error import ConfigError
from dmole.models.vision_language import VisionLanguageModel
from dmole.recipes import ATTENTION, RECIPES, paper
from dmole.sources import check_named


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_round_trip(name: str) -> None:
    config = RECIPES[name]()
    assert build_config(config.to_dict()).to_dict() == config.to_dict()


def test_the_paper_s_recipe_leaves_stream_and_model_to_the_user() -> None:
    assert (RECIPES["paper"]().stream, RECIPES["paper"]().model) == ("", "")
    with pytest.raises(ConfigError, match=r"stream: got none; expected a folder with stream.yaml, or one of .*mini"):
        check_named(RECIPES["paper"]())
    with pytest.raises(ConfigError, match=r"model: got none; expected a folder or hub id of a model, or one of mini"):
        check_named(RECIPES["paper"]().replace(stream="mine"))
    check_named(RECIPES["paper"]().replace(stream="mine", model="theirs"))


def test_papers_candidates_are_the_attention_projections(tiny_model: VisionLanguageModel) -> None:
    config = paper()
    chosen = config.method_settings("dmole").select_candidates(tiny_model.candidates)
    names = {name.rpartition(".")[2] for linears in chosen.values() for name in linears}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "out_proj"}
    assert re.search(ATTENTION, "vision_tower.encoder.layer.3.attention.qkv")
    assert not re.search(ATTENTION, "language_model.layers.0.mlp.gate_proj")
    assert config.training.epochs_of == {"sk_vg": 5, "vizwiz_vqa": 5, "iconqa": 5}


def test_the_released_code_sets_every_switch_that_reproduces_it_and_the_paper_none() -> None:
    released, published = RECIPES["released_code"](), paper()
    changed = {
        "score_aggregation": "sum",
        "vision_floor": 0.25,
        "routing": "batch_vote",
        "training_neighbour": "batch_vote",
    }
    own = released.to_dict()["dmole"]
    assert {name: own[name] for name in changed} == changed
    assert own["router"] == published.to_dict()["dmole"]["router"] | {
        "epochs": 1000, "learning_rate": 5e-3, "final_learning_rate": 1e-3, "batch_size": 1024, "patience": 10
    }  # fmt: skip
    assert released.to_dict()["seq_ft"] == {"mode": "merge_and_restart"}
    assert released.lora == published.lora and released.training == published.training
