# SPDX-License-Identifier: Apache-2.0
"""Gradients through gates do not depend on which calls came before; recomputation finds the gates of its forward."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmole_kernels import ExpertGates, MultiLoRALinear, cpu

# Of torch.compile, for any input that is no leaf.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

FEATURES = 6
HELD = (("charts", "maps"), ("films", "charts"), ("maps",))  # of three layers: no layer holds all
NAMES = ("films", "maps", "charts")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gates = ExpertGates()
        self.layers = nn.ModuleList(MultiLoRALinear(nn.Linear(FEATURES, FEATURES), gates=self.gates) for _ in HELD)
        for layer, held in zip(self.layers, HELD, strict=True):
            for name in held:
                layer.bank.add(name, 2, alpha=4.0)
                nn.init.normal_(layer.bank.expert(name).lora_b)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def true_loss(model: Model, x: Tensor, gate: Tensor) -> Tensor:
    """In float64, from the layers' tensors alone; gate [samples, 3], in the order of NAMES."""
    y = x.double()
    for layer in model.layers:
        out = y @ layer.base.weight.double().t() + layer.base.bias.double()
        for column, name in enumerate(NAMES):
            if name in layer.bank:
                expert = layer.bank.expert(name)
                delta = y @ expert.lora_a.double().t() @ expert.lora_b.double().t() * expert.scale
                out = out + gate[:, column, None, None] * delta
        y = torch.tanh(out)
    return y.square().sum()


X = torch.randn(3, 4, FEATURES, generator=torch.Generator().manual_seed(1))
GATE = torch.tensor([[1.0, 0.0, 0.5], [0.0, -1.0, 1.0], [0.0, 0.0, 2.0]])


def train(model: Model, x: Tensor) -> int:
    model(x).square().sum().backward()
    return 1


def train_twice(model: Model, x: Tensor) -> int:
    return train(model, x) + train(model, x)


def retain_graph(model: Model, x: Tensor) -> int:
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    return 2


def without_gradients(model: Model, x: Tensor) -> int:
    with torch.no_grad():
        model(x)
    return 0


def in_inference_mode(model: Model, x: Tensor) -> int:
    with torch.inference_mode():
        model(x)
    return 0


def reentrant(model: Model, x: Tensor) -> int:
    checkpoint(model, x.requires_grad_(), use_reentrant=True).square().sum().backward()
    return 1


def non_reentrant(model: Model, x: Tensor) -> int:
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    return 1


def non_reentrant_retained(model: Model, x: Tensor) -> int:
    y = checkpoint(model, x, use_reentrant=False, context_fn=model.gates.checkpoint_contexts)
    loss = y.square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    return 2


CALLS = [
    train, train_twice, retain_graph, without_gradients, in_inference_mode, reentrant, non_reentrant,
    non_reentrant_retained,
]  # fmt: skip
COMPILED: Any = {"backend": "aot_eager", "fullgraph": True, "dynamic": True}


def check(model: Model, gate: Tensor, times: int) -> None:
    wide = gate.detach().double().requires_grad_()
    true_loss(model, X, wide).backward()
    assert gate.grad is not None
    torch.testing.assert_close(gate.grad.double(), times * wide.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("calls", list(itertools.permutations(CALLS, 2)), ids=lambda c: "-".join(f.__name__ for f in c))
def test_every_order_of_calls(calls: tuple[Callable[[Model, Tensor], int], ...]) -> None:
    model = Model()
    gate = GATE.clone().requires_grad_()
    with model.gates.use(gate, NAMES):
        times = sum(call(model, X.clone()) for call in (*calls, train))
    check(model, gate, times)


@pytest.mark.parametrize("first", CALLS, ids=lambda f: f.__name__)
def test_every_call_first_in_a_block_that_was_made_without_gradients(first: Callable[[Model, Tensor], int]) -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        model = Model()
        gate = GATE.clone().requires_grad_()
        with mode():
            block = model.gates.use(gate, NAMES)
        with block:
            times = first(model, X.clone()) + train(model, X.clone())
        check(model, gate, times)


@pytest.mark.parametrize("made", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_compiled_backwards_in_one_block(made: Callable[[], Any]) -> None:
    """Two forwards, then two backwards, with names in another order than the layers', and a block made anywhere."""
    torch._dynamo.reset()
    model = Model()
    compiled: Any = torch.compile(model, **COMPILED)
    gate = GATE.clone().requires_grad_()
    with made():
        block = model.gates.use(gate, NAMES)
    with block:
        losses = [compiled(X).square().sum() for _ in range(2)]
        for loss in losses:
            loss.backward()
        times = 2 + train(model, X) + train(compiled, X)
    check(model, gate, times)


def test_a_gate_that_is_an_inference_tensor_and_a_call_in_inference_mode_come_before_training() -> None:
    model = Model()
    x = X.clone().requires_grad_()
    with torch.inference_mode():
        gate = GATE.clone()
    with model.gates.use(gate, NAMES):
        in_inference_mode(model, X)
        without_gradients(model, X)
        model(x).square().sum().backward()
    wide = X.double().requires_grad_()
    true_loss(model, wide, GATE.double()).backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-4)
    with torch.inference_mode(), model.gates.use(gate, NAMES), torch.inference_mode(False):
        x.grad = None
        model(x).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-4)


def test_gradients_reach_what_made_the_gate() -> None:
    """A router: the gate is no leaf, and the layers share its node of the graph."""
    model = Model()
    router = nn.Linear(FEATURES, 3)
    with model.gates.use(router(X.mean(1)).softmax(-1), NAMES):
        checkpoint(model, X.clone().requires_grad_(), use_reentrant=True).square().sum().backward()
    found = router.weight.grad
    weight = router.weight.detach().double().requires_grad_()
    gate = (X.mean(1).double() @ weight.t() + router.bias.detach().double()).softmax(-1)
    true_loss(model, X, gate).backward()
    torch.testing.assert_close(found.double(), weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trained", [False, True], ids=["constant", "trained"])
def test_a_gate_changed_in_place_inside_the_block_is_an_error(trained: bool) -> None:
    model = Model()
    gate = GATE.clone().requires_grad_(trained)
    with model.gates.use(gate, NAMES):
        model(X)
        with torch.no_grad():
            gate.mul_(2.0)
        with pytest.raises(ValueError, match="the gate was changed in place inside its `use` block; expected it as it"):
            model(X)


def test_a_compiled_layer_sees_the_gate_as_it_was_at_the_start() -> None:
    torch._dynamo.reset()
    model = Model()
    compiled: Any = torch.compile(model, **COMPILED)
    gate = GATE.clone()
    with torch.no_grad(), model.gates.use(gate, NAMES):
        first = compiled(X)
        gate.mul_(2.0)
        assert torch.equal(compiled(X), first)


@pytest.mark.parametrize("kind", [True, False], ids=["reentrant", "saved_tensor_hooks"])
def test_recomputation_outside_the_block_raises(kind: bool) -> None:
    """Also where the base model ran in between, as the reference of a preference loss does."""
    model = Model()
    x = X.clone().requires_grad_()
    with model.gates.use(GATE, NAMES):
        loss = checkpoint(model, x, use_reentrant=kind).square().sum()
    with torch.no_grad():
        model(X)
    with pytest.raises(ValueError, match="the layer runs again during backward, outside the `gates.use` block of its"):
        loss.backward()


@pytest.mark.parametrize("kind", [True, False], ids=["reentrant", "saved_tensor_hooks"])
def test_recomputation_in_another_block_raises(kind: bool) -> None:
    model = Model()
    x = X.clone().requires_grad_()
    base = checkpoint(model, x, use_reentrant=kind).square().sum()
    with (
        model.gates.use(GATE, NAMES),
        pytest.raises(ValueError, match="in a `gates.use` block in which its forward did not run; expected the"),
    ):
        base.backward()


def test_backward_outside_the_block_with_context_fn() -> None:
    model = Model()
    gate = GATE.clone().requires_grad_()
    losses = []
    # Two batches' blocks, both left before backward; the second with its gates in another order.
    for names, columns in ((NAMES, [0, 1, 2]), (NAMES[::-1], [2, 1, 0])):
        with model.gates.use(gate[:, columns], names):
            y = checkpoint(model, X, use_reentrant=False, context_fn=model.gates.checkpoint_contexts)
            losses.append(y.square().sum())
    sum(losses).backward()
    check(model, gate, 2)
    assert model.gates.block is None


def test_a_block_opened_during_backward_gates_what_runs_there() -> None:
    """A hook that calls the model anew, in a block of its own."""
    model = Model()
    seen: list[Tensor] = []

    def hook(grad: Tensor) -> None:
        with torch.no_grad(), model.gates.use(GATE, NAMES):
            seen.append(model(X))

    y = X.clone().requires_grad_()
    y.register_hook(hook)
    with model.gates.use(GATE * 0, NAMES):
        model(y).sum().backward()
        with torch.no_grad(), model.gates.use(GATE, NAMES):
            assert torch.equal(seen[0], model(X))


def python_frames(function: Callable[[], object]) -> int:
    count = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count - 1  # without `function` itself


@pytest.mark.skipif(cpu.EXTENSION is None, reason=f"no compiled extension: {cpu.MISSING}")
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad], ids=["training", "no_grad"])
def test_a_warm_forward_takes_at_most_28_python_frames(mode: Callable[[], Any]) -> None:
    """Half of what it took before its backend was chosen once and its call was one structure."""
    gates, names = ExpertGates(), ["charts", "maps", "films", "tables"]
    layer = MultiLoRALinear(nn.Linear(FEATURES, FEATURES), gates=gates)
    for name in names:
        layer.bank.add(name, 2, alpha=4.0)
    with mode(), gates.use(torch.ones(3, 4), names):
        for _ in range(3):
            layer(X)
        frames = python_frames(lambda: layer(X))
    assert 10 < frames <= 28
