# SPDX-License-Identifier: Apache-2.0
"""The allocator: budgets refused before training, scores equal to autograd's, no weight gradient but candidates'."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dmole.data.collate import collate
from dmole.data.sample import Sample
from dmole.methods.base import answer_loss
from dmole.methods.dmole.allocation import (
    allocate,
    allocate_uniformly,
    check_vision_floor,
    layer_scores,
    proxy_subset,
)
from dmole.models.adapters import add_experts, attach
from dmole.models.vision_language import VisionLanguageModel
from dmole_kernels import ExpertGates
from mini_cmit.model.tiny import build_tiny_model

CANDIDATES = {
    "vision": tuple(f"vision.layers.{i}.{name}" for i in range(2) for name in ("q", "k")),
    "language": tuple(f"language.layers.{i}.{name}" for i in range(3) for name in ("q", "k")),
}


@pytest.fixture(scope="module")
def vlm() -> VisionLanguageModel:
    return build_tiny_model(0)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sample, ...]:
    folder = tmp_path_factory.mktemp("images")
    made = []
    for i in range(5):
        image: Path = folder / f"{i}.png"
        Image.new("RGB", (16, 16), (40 * i, 90, 200 - 30 * i)).save(image)
        answer = "red and green" if i % 2 else "no"
        made.append(Sample(id=f"s{i}", images=(image,), instruction="Answer briefly." * (1 + i % 2), answers=(answer,)))
    return tuple(made)


@pytest.mark.parametrize(
    ("budget", "floor", "message"),
    [
        (
            8,
            0.6,
            r"vision_floor: got 0.6, which is 5 of 8 linears; the vision tower can take at most 4 \(vision 4",
        ),
        (2, 0.9, "which is 2 of 2 linears; the vision tower can take at most 1"),
    ],
)
def test_a_floor_that_does_not_fit(budget: int, floor: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_vision_floor(CANDIDATES, budget=budget, unit="linear", vision_floor=floor)
    check_vision_floor({"language": CANDIDATES["language"]}, budget=budget, unit="linear", vision_floor=floor)


# Choosing


def scored(**values: float) -> dict[str, dict[str, float]]:
    scores = {tower: dict.fromkeys(names, 1.0) for tower, names in CANDIDATES.items()}
    for key, value in values.items():
        tower, layer, name = key.split("_")
        scores[tower][f"{tower}.layers.{layer}.{name}"] = value
    return scores


def test_the_best_linears_in_depth_order() -> None:
    scores = scored(vision_1_k=5.0, vision_0_q=2.0, language_2_q=9.0)
    assert allocate(scores, {"vision": 2, "language": 1}) == {
        "vision": ("vision.layers.0.q", "vision.layers.1.k"),
        "language": ("language.layers.2.q",),
    }


def test_equal_scores_go_to_the_earlier_linear() -> None:
    assert allocate(scored(), {"vision": 1, "language": 2})["language"] == CANDIDATES["language"][:2]


def test_whole_layers_by_the_root_of_the_sum_of_squares() -> None:
    # Layer 0: sqrt(3^2 + 3^2) = 4.24 beats layer 1: sqrt(4^2 + 1) = 4.12, though the best linear is in layer 1.
    scores = scored(vision_0_q=3.0, vision_0_k=3.0, vision_1_q=4.0)
    chosen = allocate(scores, {"vision": 1, "language": 3}, unit="layer")
    assert chosen["vision"] == ("vision.layers.0.q", "vision.layers.0.k")
    assert chosen["language"] == CANDIDATES["language"]


def test_allocate_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match=r"budgets\['vision'\]: got 5; expected 1 to 4, the linears of the tower"):
        allocate(scored(), {"vision": 5, "language": 1})
    with pytest.raises(ValueError, match="budgets: got towers"):
        allocate(scored(), {"vision": 1})
    with pytest.raises(ValueError, match=r"scores\['vision'\]\['vision.layers.0.q'\]: got nan; expected"):
        allocate(scored(vision_0_q=math.nan), {"vision": 1, "language": 1})


def test_uniform_placement_is_spread_over_the_depth() -> None:
    tower = {"language": tuple(f"layers.{i}.q" for i in range(8))}
    assert allocate_uniformly(tower, {"language": 4})["language"] == tuple(f"layers.{i}.q" for i in (1, 3, 5, 7))
    for budget in range(1, 9):
        assert len(allocate_uniformly(tower, {"language": budget})["language"]) == budget
    with pytest.raises(ValueError, match=r"budgets\['language'\]: got 9; expected 1 to 8"):
        allocate_uniformly(tower, {"language": 9})


# Scores


def test_proxy_subset(samples: tuple[Sample, ...]) -> None:
    many = samples * 200
    assert len(proxy_subset(many, fraction=0.01, minimum=1)) == 10
    assert len(proxy_subset(many, fraction=0.01, minimum=64)) == 64
    assert proxy_subset(samples, fraction=0.01, minimum=64) == samples
    assert proxy_subset(samples, minimum=3, seed=1) == proxy_subset(samples, minimum=3, seed=1)
    assert len({tuple(s.id for s in proxy_subset(samples, minimum=2, seed=seed)) for seed in range(20)}) > 3
    with pytest.raises(ValueError, match=r"proxy_fraction: got 0; expected a share of the samples in \(0, 1\]"):
        proxy_subset(samples, fraction=0)
    with pytest.raises(ValueError, match="proxy_min_samples: got 0; expected at least 1"):
        proxy_subset(samples, minimum=0)


def autograd_scores(
    vlm: VisionLanguageModel, samples: tuple[Sample, ...], batch_size: int
) -> dict[str, dict[str, float]]:
    """The same by plain autograd on the weights, batch gradients summed in `.grad`."""
    names = [name for tower in vlm.candidates.values() for name in tower]
    linears = {name: vlm.model.get_submodule(name) for name in names}
    try:
        for linear in linears.values():
            linear.requires_grad_(True)
        for start in range(0, len(samples), batch_size):
            answer_loss(vlm, collate(vlm, samples[start : start + batch_size], with_answers=True)).backward()
        norms = {
            name: sum(0.0 if p.grad is None else float(p.grad.norm()) for p in linear.parameters())
            for name, linear in linears.items()
        }
        return {tower: {name: norms[name] for name in names} for tower, names in vlm.candidates.items()}
    finally:
        for linear in linears.values():
            linear.requires_grad_(False)
            linear.zero_grad(set_to_none=True)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_scores_are_the_norms_of_the_summed_gradients(
    vlm: VisionLanguageModel, samples: tuple[Sample, ...], batch_size: int
) -> None:
    scores = layer_scores(vlm, samples, loss=answer_loss, batch_size=batch_size)
    want = autograd_scores(vlm, samples, batch_size)
    assert list(scores) == list(want)
    for tower, by_linear in want.items():
        assert list(scores[tower]) == list(vlm.candidates[tower])
        for name, value in by_linear.items():
            assert scores[tower][name] == pytest.approx(value, rel=1e-4, abs=1e-7), name
        assert max(by_linear.values()) > 0


def test_experts_that_are_attached_stay_out_of_the_scores(samples: tuple[Sample, ...]) -> None:
    vlm = build_tiny_model(0)
    before = layer_scores(vlm, samples, loss=answer_loss)
    adapters = attach(vlm.model, vlm.candidates, gates={tower: ExpertGates() for tower in vlm.candidates})
    add_experts(adapters, adapters, "e", rank=2, alpha=4.0)
    for adapter in adapters.values():
        torch.nn.init.normal_(adapter.bank.expert("e").lora_b)
    assert layer_scores(vlm, samples, loss=answer_loss) == before
    experts = [p for adapter in adapters.values() for p in adapter.bank.parameters()]
    assert all(p.requires_grad and p.grad is None for p in experts)


class ProductShapes(TorchDispatchMode):
    """Shapes of every matrix product's result: a weight gradient is one."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and any(op in str(func) for op in ("mm", "linear", "matmul", "einsum")):
            self.shapes.add(tuple(out.shape))
        return out


def test_no_weight_gradient_outside_the_candidates_is_computed(
    vlm: VisionLanguageModel, samples: tuple[Sample, ...]
) -> None:
    """Candidates: attention alone. The MLPs' and the head's weight gradients have shapes that nothing else has."""
    attention = {tower: tuple(n for n in names if "self_attn" in n) for tower, names in vlm.candidates.items()}
    others = {
        tuple(module.weight.shape)
        for name, module in vlm.model.named_modules()
        if isinstance(module, torch.nn.Linear) and "self_attn" not in name and tuple(module.weight.shape) != (32, 32)
    }
    assert len(others) >= 3  # up, down, head
    written: list[str] = []
    hooks = []
    for name, parameter in vlm.model.named_parameters():
        parameter.requires_grad_(True)
        hooks.append(parameter.register_post_accumulate_grad_hook(lambda p, name=name: written.append(name)))
    try:
        with ProductShapes() as seen:
            layer_scores(vlm, samples, loss=answer_loss, candidates=attention, batch_size=5)
        assert all(parameter.requires_grad for parameter in vlm.model.parameters())
        assert written == []
        assert all(parameter.grad is None for parameter in vlm.model.parameters())
        assert not seen.shapes & others

        # The instrument sees them where they do exist.
        with ProductShapes() as seen:
            answer_loss(vlm, collate(vlm, samples, with_answers=True)).backward()
        assert others <= seen.shapes
        assert written
    finally:
        for hook in hooks:
            hook.remove()
        vlm.model.requires_grad_(False)
        vlm.model.zero_grad(set_to_none=True)


def test_the_sketch_estimates_the_exact_score(vlm: VisionLanguageModel, samples: tuple[Sample, ...]) -> None:
    exact = layer_scores(vlm, samples, loss=answer_loss)
    sketch = layer_scores(vlm, samples, loss=answer_loss, method="sketch")
    for tower, by_linear in exact.items():
        for name, value in by_linear.items():
            if value > 1e-4:
                assert sketch[tower][name] == pytest.approx(value, rel=0.7), name


def test_layer_scores_refuses_bad_input(vlm: VisionLanguageModel, samples: tuple[Sample, ...]) -> None:
    with pytest.raises(ValueError, match="samples: got none; expected at least one sample"):
        layer_scores(vlm, (), loss=answer_loss)
    with pytest.raises(ValueError, match="proxy_batch_size: got 0; expected at least 1"):
        layer_scores(vlm, samples, loss=answer_loss, batch_size=0)
    norm = {"vision": ("model.vision_tower.post_layernorm",)}
    with pytest.raises(ValueError, match="is a LayerNorm; expected an nn.Linear"):
        layer_scores(vlm, samples, loss=answer_loss, candidates=norm)
