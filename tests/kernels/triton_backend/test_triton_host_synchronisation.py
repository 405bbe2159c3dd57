# SPDX-License-Identifier: Apache-2.0
"""Nothing on the way to a launch asks the device for a value: the host runs ahead, and CUDA graphs can be captured.

Three witnesses. On the meta device no value exists, and calls can still be made into launches. In the interpreter every
operation in which a GPU would make the host wait raises, while a layer trains and infers. A seed on the device reaches
the kernels as an address.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dmole_kernels import ExpertGates, GateBlock, MultiLoRALinear, multi_lora
from dmole_kernels._lora_call import LoraCall
from dmole_kernels.testing import WORKLOADS, make_inputs, multi_lora_op, poisoned_memory, run_autograd
from dmole_kernels.triton_backend.cases import CASES, Case, fused_launches, launches
from dmole_kernels.triton_backend.launch import Launch
from dmole_kernels.triton_backend.multi_lora import multi_lora_forward

READS = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"}
ATEN_READS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal", "aten::is_nonzero"}


class HostReads(TorchFunctionMode):
    """Raises on functions of a tensor that return a value to Python."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in READS and isinstance(args[0], Tensor):
            raise AssertionError(f"the host reads a tensor: {name}")
        return function(*args, **(kwargs or {}))


class DispatchedReads(TorchDispatchMode):
    """Raises on operations that return a value to the host, from any caller."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name in ATEN_READS:
            raise AssertionError(f"the host reads a tensor: {function}")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def launches_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a launch, Triton's interpreter stands for the device: what it reads is not read by the host."""
    start = Launch._start

    def unwatched(launch: Launch) -> None:
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            start(launch)

    monkeypatch.setattr(Launch, "_start", unwatched)


def a_layer() -> tuple[MultiLoRALinear, ExpertGates]:
    torch.manual_seed(0)
    gates = ExpertGates()
    layer = MultiLoRALinear(nn.Linear(24, 20), gates=gates, dropout=0.2, backend="triton")
    for name, rank in (("films", 40), ("charts", 50)):
        layer.bank.add(name, rank, alpha=rank)
    return layer, gates


def step(layer: MultiLoRALinear, x: Tensor) -> None:
    """Training, then serving with constant gates; seeds as a GPU's graph gets them, on the device."""
    experts = [layer.bank.expert(name) for name in layer.bank.names]
    block = layer.gates.block if layer.gates is not None else None
    assert block is not None
    arguments = (
        [e.lora_a for e in experts], [e.lora_b for e in experts], block.gate.to(x.device), [1.0, 2.0],
    )  # fmt: skip
    y = multi_lora(x, layer.base(x), *arguments, dropout=0.2, seed=torch.tensor(7), backend="triton")
    y.sum().backward()
    with torch.no_grad():
        multi_lora(x, layer.base(x), *arguments, backend="triton")
        layer.eval()(x)
    layer.train()


@pytest.mark.usefixtures("triton_on_cpu", "launches_alone")
@pytest.mark.parametrize("mode", [HostReads, DispatchedReads], ids=["functions", "operations"])
def test_a_training_and_a_decode_step_read_nothing_back(mode: Any) -> None:
    layer, gates = a_layer()
    x = torch.randn(2, 20, 24, requires_grad=True)
    with gates.use(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), ["films", "charts"]):
        step(layer, x)  # tables of addresses are made once
        with mode():
            step(layer, x)


@pytest.mark.parametrize("mode", [HostReads, DispatchedReads], ids=["functions", "operations"])
def test_the_witnesses_see_a_read(mode: Any) -> None:
    with mode(), pytest.raises(AssertionError, match="the host reads a tensor"):
        torch.ones(3).sum().item()
    with mode(), pytest.raises(AssertionError, match="the host reads a tensor"):
        bool(torch.ones(3).any())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_launches_are_made_where_no_values_are(case: Case) -> None:
    case = replace(case, device_seed=True)
    assert all(len(part) >= 2 for part in launches(case, "sm_90"))
    assert len(fused_launches(case, "sm_90")) == 2


def test_a_seed_on_the_device_is_passed_as_its_address_and_one_on_the_host_as_two_words() -> None:
    on_host = next(case for case in CASES if case.dropout)
    shrink, _ = launches(replace(on_host, device_seed=True), "sm_90")[0]
    assert isinstance(shrink.arguments["key_low"], Tensor) and shrink.constants["DEVICE_KEY"]
    shrink, _ = launches(replace(on_host, device_seed=False), "sm_90")[0]
    assert shrink.arguments["key_low"] == 2025 and not shrink.constants["DEVICE_KEY"]


@pytest.mark.parametrize("seed", [0, 2**62 + 3 * 2**40 + 17, -5])
def test_both_kinds_of_seed_draw_the_same_masks(seed: int) -> None:
    inputs = make_inputs(next(w for w in WORKLOADS if w.name == "dropout_shared"))
    low, high = (torch.tensor([seed]).view(torch.int32)[i].item() for i in range(2))

    def on_host(launch: Launch) -> None:
        if launch.name == "shrink":
            words = {"key_low": low, "key_high": high}
            launch = replace(
                launch, arguments={**launch.arguments, **words}, constants={**launch.constants, "DEVICE_KEY": False}
            )
        launch.run()

    arguments = (inputs.lora_a, inputs.lora_b, inputs.gate, inputs.scale, 0.3, False, torch.tensor(seed))
    _, there = multi_lora_forward(LoraCall(inputs.x, None, *arguments))
    _, here = multi_lora_forward(LoraCall(inputs.x, None, *arguments), runner=on_host)
    assert torch.equal(here, there)


@pytest.mark.usefixtures("triton_on_cpu")
def test_a_seed_written_anew_draws_other_masks_as_a_replayed_graph_would() -> None:
    inputs = make_inputs(next(w for w in WORKLOADS if w.name == "dropout_shared"))
    seed = inputs.seed.clone()
    first = run_autograd(lambda i: multi_lora_op(i, backend="triton"), replace(inputs, seed=seed))
    seed.fill_(99)
    second = run_autograd(lambda i: multi_lora_op(i, backend="triton"), replace(inputs, seed=seed))
    assert not torch.equal(first["delta"], second["delta"])


def test_a_gate_on_the_host_goes_to_the_device_and_its_active_experts_are_known_here() -> None:
    block = GateBlock(torch.tensor([[1.0, 0.0, 2.0]]), ["films", "charts", "maps"], None, "", "")
    assert block.active == ("films", "maps")
    held = ("maps", "films", "held by this layer alone")
    there = block.for_layer(held, (1, 4), None, torch.device("meta"), False).gate
    assert there is not None and there.device.type == "meta" and there.shape == (1, 2)
    assert block.for_layer(held, (1, 4), None, torch.device("meta"), False).gate is there
    with poisoned_memory():
        here = block.for_layer(held, (1, 4), None, torch.device("cpu"), False).gate
        assert here is not None and torch.equal(here, torch.tensor([[1.0, 2.0]]))
