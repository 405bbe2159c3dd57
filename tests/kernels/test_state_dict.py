# SPDX-License-Identifier: Apache-2.0
"""States of converted models: the base under its plain names, into plain models and back, on disk and on meta."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from dmole_kernels import ExpertHandle, MultiLoRALinear, convert, experts_of

from .families.tiny import FAMILIES


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.inner = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 4, bias=False))
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x).relu())  # type: ignore[no-any-return]


PLAIN = ["steps", "first.weight", "first.bias", "inner.0.weight", "inner.0.bias", "inner.1.weight"]
EXPERTS = [
    "first.bank.experts.charts.lora_a", "first.bank.experts.charts.lora_b",
    "inner.1.bank.experts.charts.lora_a", "inner.1.bank.experts.charts.lora_b",
]  # fmt: skip
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))


def made(seed: int = 0, *, expert: bool = True) -> tuple[Net, ExpertHandle]:
    torch.manual_seed(seed)
    net = Net()
    handle = convert(net)
    if expert:
        handle.add("charts", rank=2)
        for parameter in handle.parameters():
            nn.init.normal_(parameter)
    return net, handle


def gated(handle: ExpertHandle) -> Tensor:
    with handle.use(torch.ones(3, 1), ["charts"]), torch.no_grad():
        return handle.model(X)  # type: ignore[no-any-return]


def test_the_base_has_its_plain_names_and_is_whole() -> None:
    net, handle = made()
    state = net.state_dict()
    assert sorted(state) == sorted(PLAIN + EXPERTS)
    assert list(net.first.state_dict())[:2] == ["weight", "bias"]
    assert state["first.weight"].data_ptr() == net.first.base.weight.data_ptr()
    assert isinstance(net.state_dict(keep_vars=True)["first.weight"], nn.Parameter)
    base = handle.base_state_dict()
    assert sorted(base) == sorted(PLAIN)
    plain = Net()
    plain.load_state_dict(base)
    with torch.no_grad():
        torch.testing.assert_close(plain(X), net(X))


def test_a_plain_state_loads_into_a_converted_model() -> None:
    torch.manual_seed(7)
    plain = Net()
    net, _ = made(expert=False)
    assert str(net.load_state_dict(plain.state_dict())) == "<All keys matched successfully>"
    with torch.no_grad():
        torch.testing.assert_close(net(X), plain(X))
    # With experts, strict loading says that these are missing, and nothing of the base is.
    net, _ = made()
    assert net.load_state_dict(plain.state_dict(), strict=False).missing_keys == EXPERTS
    assert torch.equal(net.first.weight, plain.first.weight)
    with pytest.raises(RuntimeError, match="Missing key.*charts.lora_a"):
        net.load_state_dict(plain.state_dict())


def test_a_converted_state_loads_into_a_converted_model_and_old_names_too() -> None:
    net, handle = made()
    for rename in (str, lambda key: key.replace("first.weight", "first.base.weight").replace("1.w", "1.base.w")):
        state = {rename(key): value for key, value in net.state_dict().items()}
        other, theirs = made(seed=1)
        assert not torch.equal(gated(theirs), gated(handle))
        assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
        assert torch.equal(gated(theirs), gated(handle))


def test_missing_and_unexpected_keys_have_plain_names() -> None:
    net, _ = made(expert=False)
    state = {k: v for k, v in net.state_dict().items() if not k.startswith("first.")}
    result = net.load_state_dict({**state, "first.other": torch.ones(1), "first.b": torch.ones(1)}, strict=False)
    assert result.missing_keys == ["first.weight", "first.bias"]
    assert len(result.unexpected_keys) == 2
    result = net.first.load_state_dict({"bias": torch.zeros(5)}, strict=False)
    assert result.missing_keys == ["weight"] and torch.equal(net.first.bias, torch.zeros(5))
    # Both names at once: the one of the plain model is one too many.
    both = {**net.state_dict(), "first.base.weight": torch.ones(5, 6)}
    assert net.load_state_dict(both, strict=False).unexpected_keys == ["first.weight"]


def test_a_module_around_a_wrapped_layer_that_is_the_whole_model() -> None:
    layer = MultiLoRALinear(nn.Linear(3, 2))
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert list(layer.state_dict(prefix="a.")) == ["a.weight", "a.bias"]
    given: dict[str, Any] = {}
    layer.state_dict(destination=given)
    layer.state_dict(destination=given)
    assert list(given) == ["weight", "bias"]
    layer.load_state_dict(nn.Linear(3, 2).state_dict())


def test_hooks_survive_copies() -> None:
    import copy
    import pickle

    net, handle = made()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert sorted(other.state_dict()) == sorted(PLAIN + EXPERTS)
        before = net.first.weight.clone()
        state = {key: torch.zeros_like(value) for key, value in net.state_dict().items()}
        other.load_state_dict(state)
        assert torch.equal(other.first.weight, torch.zeros(5, 6))
        assert torch.equal(net.first.weight, before)


def test_a_state_goes_through_torch_save() -> None:
    net, handle = made()
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    other, theirs = made(seed=1)
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(gated(theirs), gated(handle))


def test_loading_while_an_expert_is_merged_is_refused() -> None:
    net, handle = made()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    handle.merge("charts")
    assert not torch.equal(net.state_dict()["first.weight"], state["first.weight"])
    assert "first.unmerged_weight" not in net.state_dict()
    with pytest.raises(
        ValueError, match=r"first: \['charts'\] are merged into the weight that is to be loaded; expected"
    ):
        net.load_state_dict(state)
    handle.unmerge("charts")
    net.load_state_dict(state)


def test_assign_on_a_meta_model_and_later_experts_are_where_the_others_are() -> None:
    net, handle = made()
    with torch.device("meta"):
        empty = Net()
    theirs = convert(empty)
    theirs.add("charts", rank=2)
    assert all(p.is_meta for p in theirs.parameters())
    empty.load_state_dict(net.state_dict(), assign=True)
    assert not any(p.is_meta or p.requires_grad for n, p in empty.named_parameters() if "bank" not in n)
    assert all(p.requires_grad for p in theirs.parameters())
    assert torch.equal(gated(theirs), gated(handle))
    theirs.add("late", rank=3)
    assert {(p.device.type, p.dtype) for p in theirs.parameters("late")} == {("cpu", torch.float32)}


def test_assigning_the_base_alone_places_the_first_expert_beside_it() -> None:
    torch.manual_seed(0)
    plain = Net()
    with torch.device("meta"):
        empty = Net()
    handle = convert(empty)
    empty.load_state_dict(plain.state_dict(), assign=True)
    handle.add("charts", rank=2)
    assert not any(p.is_meta for p in empty.parameters())
    assert torch.isfinite(gated(handle)).all()


def test_distributed_checkpoints_of_one_process() -> None:
    net, handle = made()
    state = get_model_state_dict(net)
    assert sorted(state) == sorted(PLAIN + EXPERTS)
    other, theirs = made(seed=1)
    set_model_state_dict(other, state)
    assert torch.equal(gated(theirs), gated(handle))
    third, theirs = made(seed=2)
    set_model_state_dict(third, get_model_state_dict(net, options=StateDictOptions(cpu_offload=True)))
    assert torch.equal(gated(theirs), gated(handle))


def test_the_optimizer_of_the_experts_in_distributed_checkpoints() -> None:
    states = []
    net, handle = made()
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.1)
    with handle.use(torch.ones(3, 1), ["charts"]):
        net(X).square().sum().backward()
    optimizer.step()
    state = get_optimizer_state_dict(net, optimizer)
    assert sorted(state["state"]) == sorted(EXPERTS)
    other, theirs = made(seed=1)
    fresh = torch.optim.AdamW(theirs.parameters(), lr=0.1)
    set_optimizer_state_dict(other, fresh, state)
    for one, two in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        states.append(torch.equal(one["exp_avg"], two["exp_avg"]))
    assert states == [True] * 4


def reports(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "blip2"])
def test_save_pretrained_of_a_converted_model_is_the_base(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import logging

    model = FAMILIES[family].build()
    batch = FAMILIES[family].batch([0, 0, 2], 3).arguments
    with torch.no_grad():
        base = model(**batch).logits
    handle = convert(model)
    handle.add("charts", rank=2)
    for parameter in handle.parameters():
        nn.init.normal_(parameter)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for folder, state in (("whole", None), ("base", handle.base_state_dict())):
        model.save_pretrained(tmp_path / folder, state_dict=state)  # type: ignore[operator]
        caplog.clear()
        again = type(model).from_pretrained(tmp_path / folder, attn_implementation="eager")  # type: ignore[attr-defined]
        assert "MISSING" not in reports(caplog) and "newly initialized" not in reports(caplog)
        # Experts in the folder of the base are ignored and reported; the state of the base has none.
        assert ("UNEXPECTED" in reports(caplog)) == (state is None)
        with torch.no_grad():
            assert torch.equal(again(**batch).logits, base)
    assert experts_of(model).names == ("charts",)


def test_a_merged_model_is_saved_as_a_plain_one(tmp_path: Path) -> None:
    model = FAMILIES["llava"].build()
    batch = FAMILIES["llava"].batch([0, 1, 2], 3)
    handle = convert(model)
    handle.add("charts", rank=2)
    for parameter in handle.parameters():
        nn.init.normal_(parameter, std=0.1)
    with torch.no_grad(), handle.use(torch.ones(3, 1), ["charts"], units=batch.units):
        gated = model(**batch.arguments).logits
    handle.merge("charts")
    handle.unconvert()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")  # type: ignore[attr-defined]
    with torch.no_grad():
        torch.testing.assert_close(again(**batch.arguments).logits, gated, rtol=1e-4, atol=1e-5)
