# SPDX-License-Identifier: Apache-2.0
"""torch.func and forward mode are refused by every op and by the layer; second derivatives are never silent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, func, nn
from torch.autograd import forward_ad

from dmole_kernels import (
    BACKENDS,
    ExpertGates,
    MultiLoRALinear,
    accumulate_gradient,
    accumulate_sketch,
    frozen_linear,
    router_select,
    use_backend,
)

from .op_calls import CALLS, Call, close, draw, tensors_of

# PyTorch's own first use of forward mode compiles decompositions with it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


@pytest.fixture(params=[name for name in BACKENDS if name in ("cpu", "reference")])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make_layer(gates: ExpertGates | None = None, dropout: float = 0.0) -> MultiLoRALinear:
    torch.manual_seed(0)
    layer = MultiLoRALinear(nn.Linear(6, 5), gates=gates, dropout=dropout)
    for expert, rank in (("charts", 2), ("maps", 3)):
        layer.bank.add(expert, rank, alpha=4.0)
        nn.init.normal_(layer.bank.expert(expert).lora_b)
    return layer


REFUSAL = "is under a torch.func transform or in forward-mode differentiation; expected plain autograd. Differentiate"
TRANSFORMS: dict[str, Callable[[Call, Tensor], Any]] = {
    "grad": lambda call, x: func.grad(lambda t: call(t).sum())(x),
    "vjp": lambda call, x: func.vjp(call, x),
    "jvp": lambda call, x: func.jvp(call, (x,), (x,)),
    "vmap": lambda call, x: func.vmap(call)(torch.stack([x, x])),
    "jacrev": lambda call, x: func.jacrev(call)(x),
    "jacfwd": lambda call, x: func.jacfwd(call)(x),
    "hessian": lambda call, x: func.hessian(lambda t: call(t).sum())(x),
    "forward_ad": lambda call, x: tangent_of(call, x),
}


def tangent_of(call: Call, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(x, x))).tangent


def calls_of_one_tensor(backend: str) -> dict[str, tuple[str, Call, Tensor]]:
    """Each public op, and the layer with experts, as a function of its first tensor, with the name it goes by."""
    calls: dict[str, tuple[str, Call, Tensor]] = {}
    for name, make in CALLS.items():
        call, (first, *rest) = make(backend), tensors_of(name)
        op = next(op for op in ("multi_lora", "grad_norm_per_sample", "router_score", "masked_max_pool")
                  if op.startswith(name.rpartition("_")[0] or name) or name.startswith(op))  # fmt: skip
        calls[name] = (op, lambda t, call=call, rest=rest: call(t, *rest), first)
    gates = ExpertGates()
    layer, x, gate = make_layer(gates), draw(2, 3, 6), torch.ones(2, 2)
    weight, left, right, threshold = draw(5, 6), draw(6, 2), draw(6, 2), draw(3)

    def gated(t: Tensor) -> Tensor:
        with gates.use(gate, ["maps", "charts"]), use_backend(backend):
            return layer(t)

    def adding(t: Tensor) -> Tensor:
        accumulate_gradient(torch.zeros(6, 6), t, t, backend=backend)
        return t

    def sketching(t: Tensor) -> Tensor:
        accumulate_sketch(torch.zeros(2, 2), t, t, left, right, backend=backend)
        return t

    calls |= {
        "layer": ("MultiLoRALinear", lambda t: layer(t, gate), x),
        "block": ("gates.use", gated, x),
        "router_select": ("router_select", lambda t: router_select(t, threshold, backend=backend), draw(4, 3)),
        "frozen_linear": ("frozen_linear", lambda t: frozen_linear(t, weight, backend=backend), x),
        "accumulate_gradient": ("accumulate_gradient", adding, draw(4, 6)),
        "accumulate_sketch": ("accumulate_sketch", sketching, draw(4, 6)),
    }
    return calls


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", calls_of_one_tensor("reference"))
def test_torch_func_and_forward_mode_are_refused(name: str, transform: str, backend: str) -> None:
    """A registered op would be left without a derivative, or with a tangent of zero in silence."""
    op, call, x = calls_of_one_tensor(backend)[name]
    call(x)
    with pytest.raises(NotImplementedError, match=f"^{op} {REFUSAL}"):
        TRANSFORMS[transform](call, x)
    call(x)


def test_a_block_around_a_transform_is_refused_and_not_spoilt_by_it(backend: str) -> None:
    gates = ExpertGates()
    layer, x = make_layer(gates), draw(3, 4, 6)
    with use_backend(backend), gates.use(torch.ones(3, 2), ["maps", "charts"]):
        with pytest.raises(NotImplementedError, match=f"^MultiLoRALinear {REFUSAL}"):
            func.grad(lambda t: layer(t).sum())(x)
        y = layer(x)
        with pytest.raises(NotImplementedError, match=f"^MultiLoRALinear {REFUSAL}"):
            func.vmap(layer)(x[:, None])
        assert torch.equal(layer(x), y)


def test_a_layer_without_active_experts_is_its_base_under_torch_func(backend: str) -> None:
    gates = ExpertGates()
    layer, x = make_layer(gates), draw(2, 3, 6)
    expected = torch.ones(2, 3, 5) @ layer.base.weight
    with use_backend(backend):
        close(func.grad(lambda t: layer(t).sum())(x), expected)
        with gates.use(torch.zeros(2, 1), ["maps"]):  # the block around the transform
            close(func.grad(lambda t: layer(t).sum())(x), expected)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_torch_func_inside_a_compiled_function_is_an_error(compiler: str, backend: str) -> None:
    op, call, x = calls_of_one_tensor(backend)["grad_norm_direct"]
    torch._dynamo.reset()
    with pytest.raises((NotImplementedError, RuntimeError), match=op):
        torch.compile(lambda t: func.jvp(call, (t,), (t,))[1], backend=compiler)(x)


def test_second_derivatives_are_refused_or_right(backend: str) -> None:
    """Those of multi_lora and router_score have kernels for the first derivative alone."""
    for name in ("multi_lora", "router_score"):
        call, (x, *rest) = CALLS[name](backend), tensors_of(name)
        x.requires_grad_()
        (slope,) = torch.autograd.grad(call(x, *rest).square().sum(), x, create_graph=True)
        with pytest.raises((NotImplementedError, RuntimeError), match="has no derivative|differentiate twice"):
            slope.sum().backward()
    call, (x, grad) = CALLS["grad_norm"](backend), (tensor.double() for tensor in tensors_of("grad_norm"))
    if backend == "reference":
        assert torch.autograd.gradgradcheck(call, (x.requires_grad_(), grad.requires_grad_()))
