# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmole.models.declaration import Rows
from dmole.models.units import measured_rows, rule_of, vision_units
from dmole_kernels import ExpertGates, MultiLoRALinear
from tests.kernels.families.tiny import FAMILIES

IMAGE = 5


def inputs(*tokens: int, **more: Any) -> dict[str, Any]:
    """input_ids with so many image tokens in each sample."""
    ids = torch.full((len(tokens), max(tokens) + 1), 9)
    for row, number in zip(ids, tokens, strict=True):
        row[:number] = IMAGE
    return {"input_ids": ids, **more}


def units(
    rows: Rows, images: list[int], given: dict[str, Any], length: int | None = None, config: object = None
) -> list[int]:
    return vision_units(rows, images=images, inputs=given, image_token_id=IMAGE, config=config, length=length)


def test_rows_are_images_where_their_number_is_the_leading_dimension() -> None:
    assert units("auto", [2, 0, 1], inputs(20, 0, 3), length=3) == [2, 0, 1]


def test_rows_follow_the_image_tokens_elsewhere() -> None:
    assert units("auto", [2, 0, 1], inputs(12, 0, 4), length=64) == [12, 0, 4]


@pytest.mark.parametrize(("rows", "expected"), [("images", [2, 0, 1]), ("padded", [1, 1, 1]), ("tokens", [12, 0, 4])])
def test_a_declared_rule_needs_no_measurement(rows: Rows, expected: list[int]) -> None:
    assert units(rows, [2, 0, 1], inputs(12, 0, 4)) == expected


def test_a_batch_without_images_has_no_rows() -> None:
    for rows in ("auto", "images", "tokens", "tiles", "padded"):
        assert units(rows, [0, 0], inputs(0, 0)) == [0, 0]  # type: ignore[arg-type]


def test_tiles_are_the_whole_image_and_its_parts() -> None:
    config = SimpleNamespace(image_grid_pinpoints=[[16, 32], [32, 32]], vision_config=SimpleNamespace(image_size=16))
    sizes = torch.tensor([[16, 32], [32, 32], [10, 20]])  # 1 + 2, 1 + 4, 1 + 2
    assert units("tiles", [2, 0, 1], inputs(9, 0, 5, image_sizes=sizes), config=config) == [8, 0, 3]
    # LLaVA-OneVision's processor says how many images each prompt has: of several none is cut.
    several = inputs(9, 0, 5, image_sizes=sizes, batch_num_images=torch.tensor([2, 1]))
    assert units("tiles", [2, 0, 1], several, config=config) == [2, 0, 3]


def test_tiles_without_pinpoints_are_refused() -> None:
    config = SimpleNamespace(vision_config=SimpleNamespace(image_size=16))
    with pytest.raises(ValueError, match=r"declaration.rows: got 'tiles' with image_sizes of None images.*Set other"):
        units("tiles", [1], inputs(4), config=config)


@pytest.mark.parametrize(
    ("images", "tokens", "length", "said"),
    [
        ([2, 0, 1], (10, 0, 4), 64, "a whole number of rows for each sample"),
        ([2, 0, 1], (0, 0, 0), 64, "expected image tokens in the samples with images"),
        ([2, 0, 1], (10, 3, 4), 17, "expected image tokens in the samples with images"),
    ],
)
def test_rows_that_cannot_be_told_apart_are_refused(
    images: list[int], tokens: tuple[int, ...], length: int, said: str
) -> None:
    with pytest.raises(ValueError, match=rf"rows: got {length} rows .*{said}.*Set declaration.rows"):
        units("auto", images, inputs(*tokens), length=length)


def test_rows_that_may_be_a_padded_batch_are_refused() -> None:
    """Mllama without its line in KNOWN: 12 rows are whole for tokens 2, 0, 1, and every sample owns 4 of them."""
    pixels = torch.zeros(3, 2, 2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"rows: got 12 rows .* padded to 2 images a sample"):
        units("auto", [2, 0, 1], inputs(2, 0, 1, pixel_values=pixels), length=12)


def test_declared_tokens_without_any_are_refused() -> None:
    with pytest.raises(ValueError, match=r"declaration.rows: got 'tokens' .*Set declaration.image_token_id"):
        units("tokens", [1, 1], inputs(4, 0))


@pytest.mark.parametrize(
    ("measured", "rule"),
    [
        ([(2, 32), (2, 32)], "images"),
        ([(2, 32), (2, 48)], "images"),
        ([(6, None), (6, None)], "images"),
        ([(128, 32), (96, 24)], "tokens"),
    ],
)
def test_the_rule_follows_from_images_of_several_shapes(measured: list[tuple[int, int | None]], rule: str) -> None:
    assert rule_of(measured) == rule


@pytest.mark.parametrize("measured", [[(10, 176), (6, 68)], [(10, None), (6, None)], [(10, 0), (6, 4)]])
def test_no_rule_for_rows_in_no_proportion(measured: list[tuple[int, int | None]]) -> None:
    with pytest.raises(ValueError, match=r"rows: images of different shapes .*Set declaration.rows to tiles or padded"):
        rule_of(measured)


def test_measuring_leaves_the_forward_at_the_first_candidate() -> None:
    model = FAMILIES["llava"].build()
    reached: list[str] = []
    for name in ("model.vision_tower.encoder.layers.0.layer_norm1", "model.vision_tower.encoder.layers.0.mlp"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: reached.append(name))
    candidates = ["model.vision_tower.encoder.layers.0.self_attn.q_proj", "model.vision_tower.encoder.layers.0.mlp.fc1"]
    hooks = [len(model.get_submodule(name)._forward_pre_hooks) for name in candidates]
    assert measured_rows(model, candidates, FAMILIES["llava"].batch([0, 0, 2], 3).arguments) == 3
    assert reached == ["model.vision_tower.encoder.layers.0.layer_norm1"]
    assert [len(model.get_submodule(name)._forward_pre_hooks) for name in candidates] == hooks


def test_measuring_says_when_no_candidate_is_reached() -> None:
    model = FAMILIES["llava"].build()
    text = FAMILIES["llava"].batch([], 3).arguments
    text.pop("pixel_values")
    with pytest.raises(ValueError, match=r"candidates: a forward with images called no candidate .*declaration.vision"):
        measured_rows(model, ["model.vision_tower.encoder.layers.0.mlp.fc1"], text)


def test_three_images_of_three_samples_are_not_taken_for_samples() -> None:
    """Images owned by samples 0, 0 and 2: the gate [3, 1] fits the tower's x [3, T, d], and image 1 is sample 0's."""
    gates = ExpertGates()
    layer = MultiLoRALinear(nn.Linear(4, 4), gates=gates, rows="units")
    layer.bank.add("a", rank=2, alpha=4.0)
    nn.init.normal_(layer.bank.expert("a").lora_b)
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    base = layer.base(x)
    with gates.use(torch.tensor([[1.0], [0.0], [0.0]]), ["a"], units=units("auto", [2, 0, 1], inputs(8, 0, 4), 3)):
        y: Tensor = layer(x)
    changed = [bool((y[image] - base[image]).abs().max() > 1e-3) for image in range(3)]
    assert changed == [True, True, False]
