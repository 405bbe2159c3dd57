# SPDX-License-Identifier: Apache-2.0
"""The swap test on transformers' vision-language families: a sample's result depends on its own gate alone.

Under a gate that mixes two experts, each sample's logits, gradients and generated text equal those under the gate that
gives every sample this sample's expert; on images owned one, two, one and two, none, one (as many images as samples).
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmole_kernels import ExpertHandle, convert

from .tiny import FAMILIES, Batch, Family

SAMPLES = 3
OWNERS = {"one_two_one": [0, 1, 1, 2], "two_none_one": [0, 0, 2]}
EXPERTS = ["a", "b"]
MIXED = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
TOWERS = ["vision", "language", "both"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = FAMILIES[request.param]
    return found


def converted(family: Family, tower: str) -> tuple[nn.Module, ExpertHandle]:
    model = family.build()
    both = f"({family.vision})|({family.language})"
    regex = {"vision": family.vision, "language": family.language, "both": both}[tower]
    linears = [n for n, m in model.named_modules() if type(m) is nn.Linear and re.fullmatch(regex, n)]
    handle = convert(model, targets=linears)
    torch.manual_seed(1)
    for name, rank in (("a", 2), ("b", 3)):
        handle.add(name, rank=rank, alpha=4.0 * rank)
    for parameter in handle.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, handle


def logits(model: nn.Module, batch: Batch) -> Tensor:
    found: Tensor = model(**batch.arguments).logits
    return found


def difference(one: Tensor, other: Tensor, batch: Batch, sample: int) -> float:
    """The largest over the sample's real tokens."""
    real = batch.arguments["attention_mask"][sample].bool()
    return float((one[sample, -len(real) :][real] - other[sample, -len(real) :][real]).abs().max())


@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("tower", TOWERS)
def test_logits_of_a_sample_follow_its_own_gate(family: Family, tower: str, owners: str) -> None:
    model, handle = converted(family, tower)
    batch = family.batch(OWNERS[owners], SAMPLES)
    with torch.no_grad():
        off = logits(model, batch)
        with handle.use(MIXED, EXPERTS, units=batch.units):
            mixed = logits(model, batch)
        for sample in range(SAMPLES):
            with handle.use(MIXED[sample].expand(SAMPLES, 2), EXPERTS, units=batch.units):
                uniform = logits(model, batch)
            assert difference(mixed, uniform, batch, sample) < 1e-4
            # An expert of the vision tower reaches the samples that own an image.
            if tower != "vision" or sample in OWNERS[owners]:
                assert difference(uniform, off, batch, sample) > 1e-3


@pytest.mark.parametrize("tower", TOWERS)
def test_gradients_of_a_sample_do_not_depend_on_the_other_gates(family: Family, tower: str) -> None:
    model, handle = converted(family, tower)
    batch = family.batch(OWNERS["two_none_one"], SAMPLES)
    parameters = list(handle.parameters())

    def gradients(gate: Tensor, sample: int) -> list[Tensor]:
        with handle.use(gate, EXPERTS, units=batch.units):
            real = batch.arguments["attention_mask"][sample].bool()
            loss = logits(model, batch)[sample, -len(real) :][real].square().mean()
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    reached = 0.0
    for sample in range(SAMPLES):
        mixed, uniform = gradients(MIXED, sample), gradients(MIXED[sample].expand(SAMPLES, 2), sample)
        for one, other in zip(mixed, uniform, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
        reached = max(reached, *(float(g.abs().max()) for g in mixed))
    assert reached > 1e-4


@pytest.mark.parametrize("beams", [1, 2])
def test_generated_text_of_a_sample_follows_its_own_gate(family: Family, beams: int) -> None:
    model, handle = converted(family, "both")
    batch = family.batch(OWNERS["two_none_one"], SAMPLES)

    def generated(gate: Tensor | None) -> Tensor:
        settings: dict[str, Any] = dict(max_new_tokens=4, do_sample=False, num_beams=beams, eos_token_id=None)
        if gate is None:
            return model.generate(**batch.arguments, **settings)  # type: ignore[operator, no-any-return]
        with handle.use(gate, EXPERTS, units=batch.units):
            return model.generate(**batch.arguments, **settings)  # type: ignore[operator, no-any-return]

    before = family.build().generate(  # type: ignore[operator]
        **batch.arguments, max_new_tokens=4, do_sample=False, num_beams=beams, eos_token_id=None
    )
    assert torch.equal(generated(None), before)
    mixed = generated(MIXED)
    for sample in range(SAMPLES):
        assert torch.equal(mixed[sample], generated(MIXED[sample].expand(SAMPLES, 2))[sample])
    assert not torch.equal(mixed, before)


def test_a_vision_tower_raises_without_units_even_where_the_numbers_agree(family: Family) -> None:
    model, handle = converted(family, "vision")
    batch = family.batch(OWNERS["two_none_one"], SAMPLES)
    with handle.use(MIXED, EXPERTS), pytest.raises(ValueError, match=r"not samples .*has no\s+units"):
        logits(model, batch)


def test_without_gates_a_converted_model_is_the_base_to_the_bit(family: Family) -> None:
    model, _ = converted(family, "both")
    batch = family.batch(OWNERS["one_two_one"], SAMPLES)
    with torch.no_grad():
        assert torch.equal(logits(model, batch), logits(family.build(), batch))
