# SPDX-License-Identifier: Apache-2.0
"""Saving, loading in place and beams inside one open `use` block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from dmole_kernels import ExpertHandle, convert, experts_of, load_experts, save_experts

NAMES = ["charts", "maps"]
GATE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, -1.0]])
IDS = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(0))


def made() -> tuple[LlamaForCausalLM, ExpertHandle]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    experts = convert(model)
    for rank, name in enumerate(NAMES, 3):
        experts.add(name, rank=rank)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model, experts


def beams(model: LlamaForCausalLM, ids: Tensor, **others: object) -> Tensor:
    found: Tensor = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, num_beams=3, do_sample=False,
        eos_token_id=None, **others,
    )  # fmt: skip
    return found


def test_an_optimizer_goes_on_after_loading_in_place_inside_a_block(tmp_path: Path) -> None:
    model, experts = made()
    optimizer = torch.optim.AdamW(experts.parameters(), lr=1e-2)
    start = [p.detach().clone() for p in experts.parameters()]
    after: list[list[Tensor]] = []
    with experts.use(GATE, NAMES):
        save_experts(model, tmp_path)
        before = model(input_ids=IDS).logits
        state = optimizer.state_dict()
        for _ in range(2):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            after.append([p.detach().clone() for p in experts.parameters()])
            assert not torch.equal(model(input_ids=IDS).logits, before)
            load_experts(model, tmp_path)
            optimizer.load_state_dict(state)
            assert torch.equal(model(input_ids=IDS).logits, before)
    assert all(torch.equal(one, two) for one, two in zip(*after, strict=True))
    assert all(not torch.equal(one, two) for one, two in zip(after[0], start, strict=True))


def test_beams_of_a_batch_are_those_of_each_sample_alone(tmp_path: Path) -> None:
    """Before and after the experts went through a folder; three beams for one row of the gate."""
    model, experts = made()
    save_experts(model, tmp_path)
    other, _ = made()
    for parameter in experts_of(other).parameters():
        nn.init.zeros_(parameter)
    load_experts(other, tmp_path)
    off = beams(model, IDS)
    for each in (model, other):
        handle = experts_of(each)
        with handle.use(GATE, NAMES, units=1):
            mixed = beams(each, IDS)
        assert not torch.equal(mixed, off)
        for sample in range(3):
            with handle.use(GATE[sample : sample + 1], NAMES, units=1):
                assert torch.equal(beams(each, IDS[sample : sample + 1])[0], mixed[sample])


def test_beams_without_units_are_refused() -> None:
    model, experts = made()
    with (
        experts.use(GATE, NAMES),
        pytest.raises(ValueError, match=r"expected gate's leading dimensions to begin x's\. .* pass use"),
    ):
        beams(model, IDS)
