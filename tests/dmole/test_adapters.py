# SPDX-License-Identifier: Apache-2.0
"""Experts on a model's linears: attaching changes nothing, states round-trip, detaching leaves no trace."""

import json

import pytest
import torch
from torch import Tensor, nn

from dmole.models.adapters import (
    Adapters,
    adapter_state,
    add_experts,
    as_pretrained,
    attach,
    detach,
    expert_parameters,
    experts_on,
    freeze_expert,
    load_adapter_state,
    remove_expert,
)
from dmole_kernels import ExpertGates, MultiLoRALinear

CANDIDATES = {"vision": ("vision.0", "vision.2"), "language": ("language.0",)}


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
        self.language = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
        self.norm = nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.language(self.vision(x)))


@pytest.fixture
def model() -> TwoTowers:
    torch.manual_seed(0)
    return TwoTowers().eval()


@pytest.fixture
def gates() -> dict[str, ExpertGates]:
    return {"vision": ExpertGates(), "language": ExpertGates()}


def with_values(adapters: Adapters, expert: str, seed: int) -> None:
    """B is zero at birth: give the expert something to say."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in expert_parameters(adapters, expert).values():
        with torch.no_grad():
            parameter.normal_(generator=generator)


def answers(model: nn.Module, gates: dict[str, ExpertGates], x: Tensor, expert: str) -> Tensor:
    gate = torch.ones(len(x), 1)
    with torch.no_grad(), experts_on(gates, gate, (expert,), units=dict.fromkeys(gates, [1] * len(x))):
        return model(x)


def linears_of(adapters: Adapters, expert: str) -> tuple[str, ...]:
    """The linears that have the expert."""
    return tuple(name for name, adapter in adapters.items() if expert in adapter.bank)


def test_attaching_changes_no_output_and_freezes_all(model: TwoTowers, gates: dict[str, ExpertGates]) -> None:
    x = torch.randn(3, 6)
    linear, before = model.vision[0], model(x)
    adapters = attach(model, CANDIDATES, gates=gates)
    assert list(adapters) == ["vision.0", "vision.2", "language.0"]
    assert model.vision[0] is adapters["vision.0"] and adapters["vision.0"].base is linear
    assert torch.equal(model(x), before)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())

    detach(model, adapters)
    assert model.vision[0] is linear
    assert not any(isinstance(module, MultiLoRALinear) for module in model.modules())


def test_a_new_expert_says_nothing_and_trains_in_fp32(model: TwoTowers, gates: dict[str, ExpertGates]) -> None:
    x = torch.randn(3, 6)
    before = model(x)
    adapters = attach(model.bfloat16().float(), CANDIDATES, gates=gates)
    add_experts(adapters, ("vision.0", "language.0"), "maps", rank=2, alpha=4.0)
    assert torch.allclose(answers(model, gates, x, "maps"), before, atol=0.1)
    assert linears_of(adapters, "maps") == ("vision.0", "language.0")
    parameters = expert_parameters(adapters, "maps")
    assert {name: tuple(p.shape) for name, p in parameters.items()} == {
        "vision.0.bank.experts.maps.lora_a": (2, 6),
        "vision.0.bank.experts.maps.lora_b": (5, 2),
        "language.0.bank.experts.maps.lora_a": (2, 4),
        "language.0.bank.experts.maps.lora_b": (3, 2),
    }
    assert set(parameters) <= set(dict(model.named_parameters()))
    assert all(p.dtype == torch.float32 and p.requires_grad for p in parameters.values())


def test_experts_follow_the_generator_alone(gates: dict[str, ExpertGates]) -> None:
    states = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        adapters = attach(TwoTowers(), CANDIDATES, gates=gates)
        add_experts(adapters, adapters, "e", rank=3, alpha=3.0, generator=torch.Generator().manual_seed(5))
        states.append(adapter_state(adapters)[0])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_freezing_and_removing(model: TwoTowers, gates: dict[str, ExpertGates]) -> None:
    adapters = attach(model, CANDIDATES, gates=gates)
    add_experts(adapters, ("vision.0",), "old", rank=2, alpha=2.0)
    add_experts(adapters, ("vision.0", "vision.2"), "new", rank=2, alpha=2.0)
    freeze_expert(adapters, "old")
    assert not any(p.requires_grad for p in expert_parameters(adapters, "old").values())
    assert all(p.requires_grad for p in expert_parameters(adapters, "new").values())
    remove_expert(adapters, "new")
    assert linears_of(adapters, "new") == ()
    assert linears_of(adapters, "old") == ("vision.0",)


def test_names_that_begin_alike_stay_apart(model: TwoTowers, gates: dict[str, ExpertGates]) -> None:
    adapters = attach(model, CANDIDATES, gates=gates)
    add_experts(adapters, ("vision.0",), "map", rank=1, alpha=1.0)
    add_experts(adapters, ("vision.0",), "maps", rank=2, alpha=1.0)
    assert len(expert_parameters(adapters, "map")) == 2
    assert len(expert_parameters(adapters)) == 4


def test_state_round_trip_is_bit_identical(model: TwoTowers, gates: dict[str, ExpertGates]) -> None:
    adapters = attach(model, CANDIDATES, gates=gates)
    add_experts(adapters, ("vision.0", "language.0"), "old", rank=2, alpha=4.0)
    add_experts(adapters, ("vision.2",), "new", rank=3, alpha=1.5)
    with_values(adapters, "old", 1)
    with_values(adapters, "new", 2)
    freeze_expert(adapters, "old")
    x = torch.randn(4, 6)
    want = {expert: answers(model, gates, x, expert) for expert in ("old", "new")}
    tensors, description = adapter_state(adapters)
    description = json.loads(json.dumps(description))

    torch.manual_seed(0)
    other_gates = {"vision": ExpertGates(), "language": ExpertGates()}
    other = TwoTowers().eval()
    loaded = attach(other, CANDIDATES, gates=other_gates)
    add_experts(loaded, ("vision.2",), "leftover", rank=1, alpha=1.0)
    random_state = torch.get_rng_state()
    load_adapter_state(loaded, tensors, description)
    assert torch.equal(torch.get_rng_state(), random_state)
    for expert in ("old", "new"):
        assert torch.equal(answers(other, other_gates, x, expert), want[expert])
    assert linears_of(loaded, "leftover") == ()
    trainable = [name for name, p in expert_parameters(loaded).items() if p.requires_grad]
    assert trainable == ["vision.2.bank.experts.new.lora_a", "vision.2.bank.experts.new.lora_b"]


def test_a_state_is_a_copy(model: TwoTowers, gates: dict[str, ExpertGates]) -> None:
    adapters = attach(model, CANDIDATES, gates=gates)
    add_experts(adapters, ("vision.0",), "e", rank=2, alpha=4.0)
    tensors, _ = adapter_state(adapters)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    with_values(adapters, "e", 1)
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)


def test_a_state_that_does_not_fit_changes_nothing(model: TwoTowers, gates: dict[str, ExpertGates]) -> None:
    adapters = attach(model, CANDIDATES, gates=gates)
    add_experts(adapters, ("vision.0",), "e", rank=2, alpha=4.0)
    tensors, description = adapter_state(adapters)
    a = "vision.0.bank.experts.e.lora_a"
    with pytest.raises(ValueError, match="adapter state: tensors lack .*lora_a.* that the description does not name"):
        load_adapter_state(adapters, {name: t for name, t in tensors.items() if name != a}, description)
    with pytest.raises(ValueError, match=r"lora_a is \(2, 7\); expected \(2, 6\). Load a state of the same"):
        load_adapter_state(adapters, {**tensors, a: torch.zeros(2, 7)}, description)
    with pytest.raises(ValueError, match="linear: got 'vision.9', which carries no adapter; expected one of the 3"):
        load_adapter_state(adapters, tensors, {"vision.9": description["vision.0"]})
    assert linears_of(adapters, "e") == ("vision.0",)


def test_attach_refuses_what_is_no_plain_linear(model: TwoTowers, gates: dict[str, ExpertGates]) -> None:
    with pytest.raises(ValueError, match=r"candidates\['vision'\]: got 'vision.7', which the model does not have"):
        attach(model, {"vision": ("vision.7",)}, gates=gates)
    with pytest.raises(ValueError, match=r"candidates\['vision'\]: 'norm' is LayerNorm; expected an nn.Linear"):
        attach(model, {"vision": ("vision.0", "norm")}, gates=gates)
    assert isinstance(model.vision[0], nn.Linear)
    with pytest.raises(ValueError, match="got 'vision.0' twice"):
        attach(model, {"vision": ("vision.0", "vision.0")}, gates=gates)
    with pytest.raises(ValueError, match="gates: got .*; expected one ExpertGates for each tower"):
        attach(model, {"audio": ("vision.0",)}, gates=gates)
    attach(model, CANDIDATES, gates=gates)
    with pytest.raises(ValueError, match="'vision.0' already carries experts; .* Call detach first"):
        attach(model, CANDIDATES, gates=gates)


def test_as_pretrained_puts_everything_back(model: TwoTowers) -> None:
    model.train()
    model.norm.requires_grad_(False)
    model.vision.eval()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(RuntimeError), as_pretrained(model):
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert {name: module.training for name, module in model.named_modules()} == modes
