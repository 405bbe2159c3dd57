# SPDX-License-Identifier: Apache-2.0
"""The contract on models that break it: each point has to notice. Wrong rows are in `test_processors`."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from dmole.models.contract import Finding, check
from dmole.models.declaration import Declaration
from dmole.models.vision_language import VisionLanguageModel, wrap
from tests.dmole.models.families.batches import probes
from tests.dmole.models.families.wide import WIDE
from tests.kernels.families.tiny import FAMILIES


def failures(vlm: VisionLanguageModel, family: str = "llava", *, save: bool = False) -> dict[int, Finding]:
    found = check(vlm, probes({**FAMILIES, **WIDE}[family]), save=save)
    return {finding.point: finding for finding in found if not finding.ok}


def test_a_value_that_is_not_saved() -> None:
    model: Any = FAMILIES["llava"].build()
    model._keys_to_ignore_on_save = {"lm_head.weight"}
    failed = failures(wrap(model), save=True)
    assert set(failed) == {1} and failed[1].remedy.startswith("save_pretrained or from_pretrained of this family")


def test_a_candidate_that_is_never_called() -> None:
    model: Any = FAMILIES["llava"].build()
    model.model.language_model.layers[1].spare = nn.Linear(32, 32)
    failed = failures(wrap(model))
    assert failed[2].tower == "language" and "1 not called: model.language_model.layers.1.spare" in failed[2].figure


def test_a_vision_tower_that_does_not_reach_the_logits() -> None:
    model: Any = FAMILIES["llava"].build()
    nn.init.zeros_(model.model.multi_modal_projector.linear_2.weight)
    failed = failures(wrap(model))
    assert set(failed) == {4} and "do not reach the logits" in failed[4].remedy


def test_a_weight_that_has_another_reader() -> None:
    model: Any = FAMILIES["llava"].build()
    mlp = model.model.vision_tower.encoder.layers[0].mlp

    def forward(x: Tensor) -> Tensor:
        return mlp.fc2(mlp.activation_fn(mlp.fc1(x)) + F.linear(x, mlp.fc1.weight))  # type: ignore[no-any-return]

    mlp.forward = forward
    vlm = wrap(model, declaration=Declaration(candidates=r".*vision_tower.*layers.0.mlp.fc1"))
    failed = failures(vlm)
    assert set(failed) == {6} and "outside the forward of its layer" in failed[6].remedy


def test_a_forward_that_swallows_logits_to_keep() -> None:
    vlm = wrap(WIDE["video_llama_3"].build(), declaration=Declaration(logits_to_keep=True))
    assert 7 in failures(vlm, "video_llama_3")


def test_an_attention_over_the_batch() -> None:
    """Samples that see each other: no gate can keep them apart."""
    model: Any = FAMILIES["llava"].build()
    norm = model.model.language_model.norm
    plain = norm.forward
    norm.forward = lambda x: plain(x + x.mean(0, keepdim=True))
    failed = failures(wrap(model))
    assert 4 in failed and "leak" in failed[4].figure


def test_a_linear_that_is_read_by_its_class() -> None:
    """A model that treats exchanged linears otherwise computes something else as soon as experts are attached."""
    model: Any = FAMILIES["llava"].build()
    layer = model.model.language_model.layers[0].mlp
    plain = layer.forward
    layer.forward = lambda x: plain(x) if type(layer.down_proj) is nn.Linear else 2 * plain(x)
    assert {3} <= set(failures(wrap(model)))


@pytest.mark.parametrize("family", ["llava"])
def test_the_model_is_left_as_it_was(family: str) -> None:
    vlm = wrap(FAMILIES[family].build())
    before = {name: tensor.clone() for name, tensor in vlm.model.state_dict().items()}
    check(vlm, probes(FAMILIES[family]), save=False)
    after = vlm.model.state_dict()
    assert list(after) == list(before) and all((after[name] == before[name]).all() for name in before)
    assert all(type(vlm.model.get_submodule(n)) is nn.Linear for names in vlm.candidates.values() for n in names)
    assert not any(p.requires_grad for p in vlm.model.parameters()) and not vlm.model.training
