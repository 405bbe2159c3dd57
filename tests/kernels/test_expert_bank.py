# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math

import pytest
import torch

from dmole_kernels import ExpertBank


def two_experts() -> ExpertBank:
    bank = ExpertBank(12, 7)
    bank.add("charts", 4, alpha=8.0)
    bank.add("maps", 3, alpha=16.0, trainable=False)
    return bank


def test_experts_are_ordinary_named_parameters() -> None:
    bank = two_experts()
    assert {name: tuple(p.shape) for name, p in bank.named_parameters()} == {
        "experts.charts.lora_a": (4, 12),
        "experts.charts.lora_b": (7, 4),
        "experts.maps.lora_a": (3, 12),
        "experts.maps.lora_b": (7, 3),
    }
    assert [name for name, p in bank.named_parameters() if p.requires_grad] == [
        "experts.charts.lora_a",
        "experts.charts.lora_b",
    ]
    assert all(p.is_leaf and p.is_contiguous() for p in bank.parameters())
    assert set(bank.state_dict()) == dict(bank.named_parameters()).keys()


def test_names_ranks_scales() -> None:
    bank = two_experts()
    assert bank.names == ("charts", "maps")
    assert len(bank) == 2
    assert "charts" in bank
    assert "films" not in bank
    assert (bank.rank("maps"), bank.scale("maps"), bank.scale("charts")) == (3, 16 / 3, 2.0)


def test_initial_values_are_peft_s_and_repeat_with_the_generator() -> None:
    banks = [ExpertBank(400, 5) for _ in range(2)]
    for bank in banks:
        bank.add("a", 64, alpha=1.0, generator=torch.Generator().manual_seed(3))
    a = banks[0].expert("a").lora_a
    assert torch.equal(a, banks[1].expert("a").lora_a)
    assert not banks[0].expert("a").lora_b.any()
    expected = torch.empty(64, 400)
    torch.nn.init.kaiming_uniform_(expected, a=math.sqrt(5), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(a.detach(), expected)


def test_freeze_unfreeze_remove() -> None:
    bank = two_experts()
    bank.expert("charts").lora_a.sum().backward()
    bank.freeze("charts")
    assert bank.expert("charts").lora_a.grad is None
    assert not any(p.requires_grad for p in bank.parameters())
    bank.unfreeze("maps")
    assert bank.describe()["maps"]["trainable"]
    bank.remove("charts")
    assert bank.names == ("maps",)
    bank.add("charts", 2, alpha=1.0)
    assert bank.rank("charts") == 2


def test_describe_and_state_dict_round_trip_without_moving_the_default_generator() -> None:
    bank = two_experts()
    with torch.no_grad():
        for p in bank.parameters():
            p.normal_()
    description = json.loads(json.dumps(bank.describe()))
    copy = ExpertBank(12, 7)
    copy.add("stale", 9, alpha=1.0)
    state = torch.get_rng_state()
    copy.restore(description)
    copy.load_state_dict(bank.state_dict())
    assert torch.equal(state, torch.get_rng_state())
    assert copy.describe() == bank.describe()
    assert all(torch.equal(one, two) for one, two in zip(copy.parameters(), bank.parameters(), strict=True))


def test_an_expert_added_later_is_born_where_the_bank_lives() -> None:
    bank = two_experts().to(torch.float64)
    bank.add("films", 2, alpha=1.0)
    assert {p.dtype for p in bank.parameters()} == {torch.float64}


def test_errors_tell_what_to_do() -> None:
    bank = two_experts()
    with pytest.raises(
        ValueError, match=r"name='charts' is already an expert here; .* remove\(\) the old expert first"
    ):
        bank.add("charts", 4, alpha=8.0)
    for name in ("", "a.b", "items", "train"):
        with pytest.raises(ValueError, match="cannot name a submodule; expected a new, non-empty name without dots"):
            bank.add(name, 4, alpha=8.0)
    for rank in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="expected an integer of at least 1. Use 8 to start"):
            bank.add("films", rank, alpha=8.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha=nan for expert 'films'; expected a finite number"):
        bank.add("films", 4, alpha=float("nan"))
    with pytest.raises(
        ValueError, match=r"expert 'films' is not in this bank; it has \['charts', 'maps'\]. Use add\(\)"
    ):
        bank.freeze("films")
