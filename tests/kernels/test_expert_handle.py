# SPDX-License-Identifier: Apache-2.0
"""Experts on all layers at once: added, frozen, renamed, merged into the base and back, copied with their model."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmole_kernels import ExpertHandle, MultiLoRALinear, convert, experts_of

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
ONES = torch.ones(3, 1)


def made(dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, ExpertHandle]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).to(dtype)
    handle = convert(model)
    handle.add("charts", rank=2, alpha=3.0)
    handle.add("maps", rank={"0": 3})
    for parameter in handle.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model, handle


def with_expert(handle: ExpertHandle, name: str, x: Tensor = X) -> Tensor:
    with handle.use(torch.ones(len(x), 1), [name]), torch.no_grad():
        return handle.model(x)  # type: ignore[no-any-return]


def test_ranks_and_alphas_by_layer() -> None:
    _, handle = made()
    handle.add("films", rank={"0": 4, "2": 1})
    handle.add("icons", targets=["2"], trainable=False)
    banks = {place: layer.bank for place, layer in handle.layers.items()}
    assert {place: banks[place].describe() for place in banks} == {
        "0": {
            "charts": {"rank": 2, "alpha": 3.0, "trainable": True},
            "maps": {"rank": 3, "alpha": 6.0, "trainable": True},
            "films": {"rank": 4, "alpha": 8.0, "trainable": True},
        },
        "2": {
            "charts": {"rank": 2, "alpha": 3.0, "trainable": True},
            "films": {"rank": 1, "alpha": 2.0, "trainable": True},
            "icons": {"rank": 8, "alpha": 16.0, "trainable": False},
        },
    }
    assert handle.names == ("charts", "maps", "films", "icons")


@pytest.mark.parametrize(
    "arguments, text",
    [
        (dict(name="charts"), "0: name='charts' is already an expert here"),
        (dict(name="maps"), "0: name='maps' is already an expert here"),
        (dict(name="training"), "0: name='training' cannot name a submodule"),
        (dict(name="_modules"), "0: name='_modules' cannot name a submodule"),
        (dict(name="a.b"), "0: name='a.b' cannot name a submodule"),
        (dict(name="new", rank=0), "0: rank=0 for expert 'new'; expected an integer of at least 1"),
        (dict(name="new", rank={"0": 2, "2": True}), "2: rank=True for expert 'new'"),
        (dict(name="new", rank={"1": 2}), "rank: '1' is neither the name nor the ending of a layer here"),
        (dict(name="new", rank={"0": 2}, targets=["2"]), "rank: '0' is neither the name"),
        (dict(name="new", rank={"0": 2}, targets=["0", "2"]), "rank: no key matches the target '2'"),
        (dict(name="new", targets=["1"]), "targets: '1' is neither the name nor the ending of a layer with experts"),
        (dict(name="new", alpha=float("inf")), "alpha=inf for expert 'new'; expected a finite number"),
    ],
)
def test_an_add_that_is_refused_changes_nothing(arguments: dict[str, Any], text: str) -> None:
    model, handle = made()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=text):
        handle.add(**arguments)
    assert list(model.state_dict()) == before


def test_alpha_none_is_an_error_of_a_bank_and_alpha_takes_effect_at_once() -> None:
    _, handle = made()
    bank = handle.layers["0"].bank
    with pytest.raises(ValueError, match="alpha=None for expert 'new'; expected a finite number"):
        bank.add("new", 2, alpha=None)  # type: ignore[arg-type]
    one = with_expert(handle, "maps")
    off = handle.model(X)
    bank.expert("maps").alpha *= 0.0
    torch.testing.assert_close(with_expert(handle, "maps"), off, rtol=1e-6, atol=1e-6)
    assert (one - off).abs().max() > 0.1


def test_freeze_unfreeze_rename_remove() -> None:
    _, handle = made()
    parameters = handle.parameters("charts")
    assert len(parameters) == 4 and len(handle.parameters()) == 6
    handle.freeze("charts")
    assert [p.requires_grad for p in handle.parameters()] == [False, False, True, True, False, False]
    handle.unfreeze("charts")
    expected = with_expert(handle, "charts")
    handle.rename("charts", "diagrams")
    assert handle.names == ("diagrams", "maps")
    assert all(one is two for one, two in zip(parameters, handle.parameters("diagrams"), strict=True))
    assert torch.equal(with_expert(handle, "diagrams"), expected)
    handle.remove("diagrams")
    assert handle.names == ("maps",)


def test_unknown_and_taken_names_are_errors_that_change_nothing() -> None:
    _, handle = made()
    calls = (handle.freeze, handle.unfreeze, handle.remove, handle.merge, handle.unmerge, handle.parameters)
    for call in calls:
        with pytest.raises(ValueError, match=r"got 'chart', which no layer holds; .* Did you mean 'charts'"):
            call("chart")  # type: ignore[operator]
    with pytest.raises(ValueError, match="0: name='maps' is already an expert here"):
        handle.rename("charts", "maps")
    with pytest.raises(ValueError, match="experts: got 'chart', which no layer of these gates holds"):
        handle.use(ONES, ["chart"])
    assert handle.names == ("charts", "maps")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_merged_expert_acts_without_a_gate_and_unmerge_gives_the_same_bits(dtype: torch.dtype) -> None:
    model, handle = made(dtype)
    weights = [layer.weight.clone() for layer in handle.layers.values()]
    identities = [id(layer.weight) for layer in handle.layers.values()]
    handle.merge("charts", weight=0.5)
    handle.merge("maps")
    wide = torch.float64
    for place, layer in handle.layers.items():
        truth = weights[list(handle.layers).index(place)].to(wide)
        for name, factor in (("charts", 0.5), ("maps", 1.0)):
            if name in layer.bank:
                expert = layer.bank.expert(name)
                truth = truth + factor * expert.alpha / expert.rank * expert.lora_b.to(wide) @ expert.lora_a.to(wide)
        rtol = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}[dtype]
        torch.testing.assert_close(layer.weight.to(wide), truth, rtol=rtol, atol=rtol)
    handle.unmerge("charts")
    assert not torch.equal(handle.layers["0"].weight, weights[0])
    assert torch.equal(handle.layers["2"].weight, weights[1])
    handle.unmerge("maps")
    assert all(torch.equal(layer.weight, w) for layer, w in zip(handle.layers.values(), weights, strict=True))
    assert [id(layer.weight) for layer in handle.layers.values()] == identities
    assert all(layer.unmerged_weight is None for layer in handle.layers.values())


def test_merged_equals_gated() -> None:
    model, handle = made()
    gated = with_expert(handle, "charts")
    handle.merge("charts")
    torch.testing.assert_close(model(X), gated)
    assert "charts: rank 2 at 2 layers, 40 parameters, trainable, merged with weight 1" in repr(handle)


def test_a_merged_expert_cannot_be_gated_removed_renamed_or_merged_again() -> None:
    model, handle = made()
    handle.merge("charts")
    text = "got 'charts', which is merged into the base and so acts on every sample already"
    with pytest.raises(ValueError, match=text):
        handle.use(torch.zeros(3, 1), ["charts"])
    with pytest.raises(ValueError, match=text):
        model[0](X, torch.ones(3, 2))
    for call in (handle.remove, handle.merge, lambda name: handle.rename(name, "new")):
        with pytest.raises(ValueError, match="0: expert 'charts' is merged into the base; expected one that is not"):
            call("charts")
    with pytest.raises(ValueError, match="got 'maps', which is not merged"):
        handle.unmerge("maps")
    assert torch.isfinite(with_expert(handle, "maps")).all()
    handle.unmerge("charts")
    assert torch.isfinite(with_expert(handle, "charts")).all()


def test_merging_is_refused_for_other_bases_broken_experts_and_inside_a_block() -> None:
    class Sub(nn.Parameter):
        pass

    model, handle = made()
    before = [layer.weight.clone() for layer in handle.layers.values()]
    with handle.use(ONES, ["charts"]), pytest.raises(ValueError, match="a `use` block of these gates is open"):
        handle.merge("charts")
    with torch.no_grad():
        handle.layers["2"].bank.expert("charts").lora_a[0, 0] = float("nan")
    with pytest.raises(ValueError, match="2: expert 'charts' holds inf or NaN"):
        handle.merge("charts")
    with pytest.raises(ValueError, match="alpha=nan for weight of expert 'maps'"):
        handle.merge("maps", weight=float("nan"))
    weight = model[0].base.weight
    model[0].base.weight = Sub(weight.detach(), requires_grad=False)
    with pytest.raises(
        ValueError, match="0: the base is a Linear with .*; expected an nn.Linear with a plain floating"
    ):
        handle.merge("maps")
    model[0].base.weight = weight
    assert all(torch.equal(layer.weight, w) for layer, w in zip(handle.layers.values(), before, strict=True))


def test_a_merged_model_that_is_moved_unmerges_to_what_it_would_have_been() -> None:
    model, handle = made()
    expected = [layer.weight.to(torch.bfloat16) for layer in handle.layers.values()]
    handle.merge("charts")
    model.to(torch.bfloat16)
    handle.unmerge("charts")
    assert all(torch.equal(layer.weight, w) for layer, w in zip(handle.layers.values(), expected, strict=True))


def test_unconvert_leaves_no_trace_but_what_is_merged() -> None:
    model, handle = made()
    linears = [model[0].base, model[2].base]
    before = model(X)
    assert handle.unconvert() is model
    assert [model[0], model[2]] == linears and torch.equal(model(X), before)
    model, handle = made()
    gated = with_expert(handle, "charts")
    handle.merge("charts")
    handle.unconvert()
    torch.testing.assert_close(model(X), gated)
    assert not any(isinstance(module, MultiLoRALinear) for module in model.modules())


def test_casting_the_model_keeps_experts_in_float32() -> None:
    model, handle = made()
    before = [p.detach().clone() for p in handle.parameters()]
    model.to(torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16
    assert all(torch.equal(p, old) for p, old in zip(handle.parameters(), before, strict=True))
    handle.add("late", rank=2)
    assert {p.dtype for p in handle.parameters("late")} == {torch.float32}


def saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)  # fmt: skip
def test_a_copy_has_gates_of_its_own_even_when_made_inside_a_block(copied: Any) -> None:
    model, handle = made()
    expected = with_expert(handle, "charts")
    off = model(X)
    with handle.use(ONES, ["charts"]):
        other = copied(model)
        with pytest.raises(
            ValueError, match="the layer's gates are a copy, and the open block belongs to the original"
        ):
            other(X)
    assert torch.equal(other(X), off)
    theirs = experts_of(other)
    assert theirs.gates is not handle.gates and theirs.names == handle.names
    assert torch.equal(with_expert(theirs, "charts"), expected)
    with theirs.use(ONES, ["charts"]), pytest.raises(ValueError, match="gates are a copy"):
        model(X)
    # Independent of the original in every way.
    theirs.remove("maps")
    theirs.merge("charts")
    assert handle.names == ("charts", "maps")
    assert torch.equal(model(X), off)


def test_a_copied_handle_goes_with_its_copied_model() -> None:
    _, handle = made()
    other = copy.deepcopy(handle)
    assert torch.equal(with_expert(other, "charts"), with_expert(handle, "charts"))
    assert other.model is not handle.model and set(other.layers) == set(handle.layers)


def test_handles_of_one_model_agree() -> None:
    model, handle = made()
    other = experts_of(model)
    other.add("late", rank=1)
    assert handle.names == ("charts", "maps", "late")
    assert handle.layers == other.layers


def test_print() -> None:
    model, handle = made()
    handle.freeze("maps")
    assert repr(handle).splitlines() == [
        "ExpertHandle: experts at 2 layers of Sequential",
        "  charts: rank 2 at 2 layers, 40 parameters, trainable",
        "  maps: rank 3 at 1 layer, 33 parameters, frozen",
    ]
    fresh = convert(nn.Sequential(nn.Linear(2, 2), nn.MultiheadAttention(4, 2)), rows="units")
    assert repr(fresh).splitlines() == [
        "ExpertHandle: experts at 1 layer of Sequential (1 with rows=units), 1 linear skipped (see .skipped)",
        "  no experts yet: add(name, rank=8)",
    ]
