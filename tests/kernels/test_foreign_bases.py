# SPDX-License-Identifier: Apache-2.0
"""A base that is not exactly a plain tensor in a plain module keeps its own forward: nothing is bypassed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from torch import Tensor, nn

from dmole_kernels import ExpertGates, MultiLoRALinear

X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
GATE = torch.tensor([[1.0], [0.0], [-0.5]])


def wrapped(base: nn.Linear, **settings: Any) -> MultiLoRALinear:
    torch.manual_seed(1)
    layer = MultiLoRALinear(base, gates=ExpertGates(), **settings)
    layer.bank.add("charts", rank=4, alpha=8.0)
    nn.init.normal_(layer.bank.expert("charts").lora_b)
    return layer


def gated(layer: MultiLoRALinear, x: Tensor = X) -> Tensor:
    assert layer.gates is not None
    with layer.gates.use(GATE, ["charts"]):
        return layer(x)  # type: ignore[no-any-return]


def delta(layer: MultiLoRALinear, x: Tensor = X) -> Tensor:
    expert = layer.bank.expert("charts")
    a, b = expert.lora_a.double(), expert.lora_b.double()
    return GATE.double()[:, None] * 2.0 * (x.double() @ a.t() @ b.t())


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, 12)


class Doubled(Tensor):
    """A weight whose product is another one, as those of quantised weights are."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, bias = args
            return 2 * F.linear(x, weight.as_subclass(Tensor), bias)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_weight_of_another_class_multiplies_for_itself() -> None:
    base = linear()
    base.weight = nn.Parameter(base.weight.detach().as_subclass(Doubled), requires_grad=False)
    expected = 2 * F.linear(X, base.weight.as_subclass(Tensor), base.bias)
    layer = wrapped(base)
    torch.testing.assert_close(gated(layer).double(), expected.double() + delta(layer), rtol=1e-5, atol=1e-5)


def test_torchao_int8_weights_give_right_outputs_and_gradients() -> None:
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    base = linear()
    quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
    assert type(base.weight) is not nn.Parameter
    weight = base.weight.dequantize().double()
    layer = wrapped(base)
    x = X.clone().requires_grad_()
    y = gated(layer, x)
    torch.testing.assert_close(y.double(), base(X).double() + delta(layer), rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    expert = layer.bank.expert("charts")
    a, b = expert.lora_a.detach().double().requires_grad_(), expert.lora_b.detach().double().requires_grad_()
    exact = X.double().requires_grad_()
    truth = F.linear(exact, weight, base.bias.double()) + GATE.double()[:, None] * 2.0 * (exact @ a.t() @ b.t())
    truth.square().sum().backward()
    for found, expected in ((x.grad, exact.grad), (expert.lora_a.grad, a.grad), (expert.lora_b.grad, b.grad)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_a_forward_patched_on_the_instance_is_called() -> None:
    class Tripled(ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 3 * output

    base = linear()
    plain = base(X).detach()
    add_hook_to_module(base, Tripled())
    layer = wrapped(base)
    torch.testing.assert_close(gated(layer).double(), 3 * plain.double() + delta(layer), rtol=1e-5, atol=1e-5)


def test_accelerate_brings_an_offloaded_base_back_for_its_forward() -> None:
    base = linear()
    plain, weights = base(X).detach(), {name: p.detach().clone() for name, p in base.named_parameters()}
    add_hook_to_module(base, AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights))
    assert base.weight.device.type == "meta"
    layer = wrapped(base)
    # The experts are where the layer computes, not where the offloaded weight waits.
    assert layer.bank.expert("charts").lora_a.device.type == "cpu"
    torch.testing.assert_close(gated(layer).double(), plain.double() + delta(layer), rtol=1e-4, atol=1e-4)


@pytest.fixture
def seen() -> Iterator[list[nn.Module]]:
    calls: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: calls.append(module))
    yield calls
    handle.remove()


def test_a_global_hook_sees_the_base(seen: list[nn.Module]) -> None:
    layer = wrapped(linear())
    gated(layer)
    assert seen == [layer.base, layer]


def test_hooks_of_every_kind_on_the_base_are_called() -> None:
    layer = wrapped(linear())
    calls: list[str] = []
    layer.base.register_forward_pre_hook(lambda module, inputs: calls.append("before"))
    layer.base.register_forward_hook(lambda module, inputs, output: calls.append("after"))
    layer.base.register_full_backward_hook(lambda module, grads, outputs: calls.append("backward"))
    gated(layer, X.clone().requires_grad_()).sum().backward()
    assert calls == ["before", "after", "backward"]


@pytest.mark.parametrize(
    "base",
    [nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4), nn.Bilinear(2, 2, 2), nn.Conv1d(4, 4, 1), nn.GELU()],
    ids=lambda base: type(base).__name__,
)
def test_what_is_no_plain_linear_is_refused(base: nn.Module) -> None:
    with pytest.raises(ValueError, match="base is a .*; expected (exactly )?nn.Linear"):
        MultiLoRALinear(base)  # type: ignore[arg-type]


def test_a_subclass_is_taken_on_request() -> None:
    class Halved(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) / 2

    with pytest.raises(ValueError, match="base is a Halved, an nn.Linear subclass; expected exactly nn.Linear"):
        MultiLoRALinear(Halved(16, 12))
    torch.manual_seed(0)
    base = Halved(16, 12)
    layer = wrapped(base, any_forward=True)
    torch.testing.assert_close(gated(layer).double(), base(X).double() + delta(layer), rtol=1e-5, atol=1e-5)
