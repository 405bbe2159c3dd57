# SPDX-License-Identifier: Apache-2.0
"""torch.compile: at most two graphs over any lengths, batches, units and active experts, the same values as eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmole_kernels import (
    ExpertGates,
    MultiLoRALinear,
    grad_norm_per_sample,
    masked_max_pool,
    multi_lora,
    router_score,
    router_select,
    use_backend,
)

# Of torch.compile, for any input that is no leaf.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]

FEATURES = 8
NAMES = tuple(f"expert{i}" for i in range(8))
BACKENDS = pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])


@pytest.fixture(autouse=True)
def forget() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def compiled(function: Any, compiler: str = "aot_eager") -> Any:
    return torch.compile(function, fullgraph=True, dynamic=True, backend=compiler)


class Model(nn.Module):
    """Three layers that hold the experts 0 to 7, 1 to 7 and 2 to 7."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gates = ExpertGates()
        self.layers = nn.ModuleList(MultiLoRALinear(nn.Linear(FEATURES, FEATURES), gates=self.gates) for _ in range(3))
        for first, layer in enumerate(self.layers):
            for i, name in enumerate(NAMES[first:]):
                layer.bank.add(name, 2, alpha=4.0, trainable=i % 2 == 0)
                nn.init.normal_(layer.bank.expert(name).lora_b)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def step(model: Model, forward: Callable[[Tensor], Tensor], x: Tensor, gate: Tensor, names: Sequence[str], units: Any,
         trained: bool) -> list[Tensor]:  # fmt: skip
    """y and all gradients."""
    x, gate = x.clone().requires_grad_(), gate.clone().requires_grad_(trained)
    model.zero_grad()
    with model.gates.use(gate, names, units=units):
        y = forward(x)
        y.square().sum().backward()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return [y.detach(), x.grad, *([gate.grad] if trained else []), *grads]


def draws(count: int) -> list[tuple[Tensor, Tensor, tuple[str, ...]]]:
    """x, a gate with two of eight experts for each sample, and its names; lengths from 2 on, batches of 2 to 5."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        samples = 2 + number % 4
        gate = torch.zeros(samples, len(NAMES))
        for row in gate:
            row[torch.randperm(len(NAMES), generator=generator)[:2]] = torch.rand(2, generator=generator) + 0.1
        names = NAMES
        if number % 2:
            # As a list: the names that are in use alone, in any order.
            used = [i for i in torch.randperm(len(NAMES), generator=generator).tolist() if gate[:, i].any()]
            gate, names = gate[:, used], tuple(NAMES[i] for i in used)
        found.append((torch.randn(samples, 2 + number, FEATURES, generator=generator), gate, names))
    return found


@BACKENDS
@pytest.mark.parametrize("trained", [False, True], ids=["constant", "trained"])
def test_two_graphs_over_24_lengths_and_active_sets(compiler: str, trained: bool) -> None:
    model = Model()
    forward = compiled(model, compiler)
    for x, gate, names in draws(24):
        one = step(model, model, x, gate, names, None, trained)
        two = step(model, forward, x, gate, names, None, trained)
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)
    assert graphs() <= 2


@BACKENDS
def test_two_graphs_over_24_units(compiler: str) -> None:
    """Images of each sample, none among them, and tokens of each image."""
    model = Model()
    forward = compiled(model, compiler)
    generator = torch.Generator().manual_seed(1)
    for number, (_, gate, names) in enumerate(draws(24)):
        units = torch.randint(0, 4, (len(gate),), generator=generator).tolist()
        units[number % len(units)] += 7
        x = torch.randn(sum(units) * (1 + number % 3), 21 + number, FEATURES, generator=generator)
        one = step(model, model, x, gate, names, units, True)
        two = step(model, forward, x, gate, names, units, True)
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)
    assert graphs() <= 2


def test_no_grad_inference_and_nested_blocks_under_one_graph_each() -> None:
    model = Model()
    forward = compiled(model, "eager")
    for mode in (torch.no_grad, torch.inference_mode):
        before = graphs()
        for x, gate, names in draws(20):
            with mode(), model.gates.use(gate, names):
                torch.testing.assert_close(forward(x), model(x), rtol=1e-4, atol=1e-4)
        assert graphs() - before <= 2


CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], Any, Any]] = {
    # x's leading dimensions, gate's, units, rows
    "images": ((3, 4), (3,), [2, 0, 1], None),
    "images_declared": ((3, 4), (3,), [2, 0, 1], "units"),
    "samples_declared": ((3, 4), (3,), [2, 0, 1], "samples"),
    "patches_in_dimension_1": ((1, 10), (3,), [4, 0, 6], None),
    "flat_patches": ((5,), (3,), [4, 0, 6], None),
    "beams": ((6, 2), (3,), 1, None),
    "one_sample": ((1, 4), (1,), 1, None),
    "vector": ((), (1,), None, None),
    "vector_with_units": ((), (1,), 1, None),
    "token_gates": ((3, 4), (3, 4), None, None),
    "token_gates_of_images": ((3, 4), (3, 4), [2, 0, 1], None),
    "token_gates_of_one_sample": ((1, 4), (1, 4), 1, None),
    "no_images": ((0, 4), (3,), [0, 0, 0], None),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rows_belong_to_the_same_samples_as_in_eager_mode(case: tuple[Any, ...]) -> None:
    leading, gates_of, units, rows = case
    model = Model()
    for layer in model.layers:
        layer.rows = rows
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(*leading, FEATURES, generator=generator)
    gate = torch.randn(*gates_of, 3, generator=generator)
    layer = model.layers[1]
    one = step(model, layer, x, gate, NAMES[1:4], units, True)
    two = step(model, compiled(layer, "eager"), x, gate, NAMES[1:4], units, True)
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)


@BACKENDS
def test_rows_that_the_units_do_not_divide_are_an_error_of_the_compiled_function(compiler: str) -> None:
    model = Model()
    forward = compiled(model, compiler)
    with torch.no_grad(), model.gates.use(torch.ones(3, 2), NAMES[:2], units=[2, 0, 1]):
        forward(torch.ones(6, 4, FEATURES))
        with pytest.raises(RuntimeError, match="units of gates.use do not give every sample a whole number of rows"):
            forward(torch.ones(7, 4, FEATURES))


def test_mistakes_have_their_reasons_under_compile() -> None:
    model = Model()
    forward = compiled(model, "eager")
    with (
        model.gates.use(torch.ones(3, 1), NAMES[:1]),
        pytest.raises((ValueError, RuntimeError), match="expected gate's leading dimensions to begin x's"),
    ):
        forward(torch.ones(4, 4, FEATURES))
    model.layers[0].rows = "units"
    with (
        model.gates.use(torch.ones(3, 1), NAMES[:1]),
        pytest.raises((ValueError, RuntimeError), match="the rows of this layer are not samples"),
    ):
        forward(torch.ones(3, 4, FEATURES))


def test_a_block_opened_inside_a_compiled_function_is_refused_with_the_reason() -> None:
    model = Model()

    def inside(x: Tensor) -> Tensor:
        with model.gates.use(torch.ones(3, 1), NAMES[:1]):
            return model(x)

    with pytest.raises((ValueError, RuntimeError), match="is opened inside a compiled function; expected the `with`"):
        compiled(inside, "eager")(torch.ones(3, 4, FEATURES))

    def backend_inside(x: Tensor) -> Tensor:
        with use_backend("reference"):
            return model(x)

    with pytest.raises((ValueError, RuntimeError), match="is opened inside a compiled function; expected the `with`"):
        compiled(backend_inside, "eager")(torch.ones(3, 4, FEATURES))


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_export_takes_a_gate_as_an_input_and_refuses_a_block(strict: bool) -> None:
    layer = Model().layers[0]
    assert layer.gates is not None
    x, gate = torch.randn(3, 4, FEATURES), torch.rand(3, 8)
    with (
        layer.gates.use(gate, NAMES),
        pytest.raises((ValueError, RuntimeError), match="would make the gates constants of the exported program; exp"),
    ):
        torch.export.export(layer, (x,), strict=strict)
    with torch.no_grad():
        program = torch.export.export(layer, (x, gate), strict=strict).module()
        for other in (gate, 1.0 - gate, gate * 0):
            torch.testing.assert_close(program(x, other), layer(x, other))
        # Without a gate and a block it is the base layer.
        torch.testing.assert_close(torch.export.export(layer, (x,), strict=strict).module()(x), layer.base(x))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_a_compiled_checkpoint_inside_a_block(compiler: str) -> None:
    model = Model()
    forward = compiled(lambda x: checkpoint(model, x, use_reentrant=False), compiler)
    for x, gate, names in draws(4):
        one = step(model, model, x, gate, names, None, True)
        two = step(model, forward, x, gate, names, None, True)
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)
    assert graphs() <= 2


def test_a_compiled_checkpoint_with_context_fn_says_that_it_needs_none() -> None:
    model = Model()

    contexts = model.gates.checkpoint_contexts
    for forward in (
        lambda x: checkpoint(model, x, use_reentrant=False, context_fn=model.gates.checkpoint_contexts),
        lambda x: checkpoint(model, x, use_reentrant=False, context_fn=contexts),
    ):
        with (
            model.gates.use(torch.ones(3, 1), NAMES[:1]),
            pytest.raises(Exception, match="Keep backward inside the `gates.use` block, where a compiled"),
        ):
            compiled(forward)(torch.ones(3, 4, FEATURES, requires_grad=True))


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize(
    "name", ["multi_lora", "router_score", "router_select", "masked_max_pool", "direct", "ghost", "auto"]
)
def test_two_graphs_of_an_op_over_20_lengths(name: str, kernels: str) -> None:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    router = (draw(3, 2, FEATURES), draw(3, 2), draw(3, FEATURES, 2), draw(3, FEATURES))
    lora = ([draw(2, FEATURES), draw(3, FEATURES)], [draw(5, 2), draw(5, 3)])
    gate, threshold = draw(4, 2), draw(3).abs()

    def op(x: Tensor, other: Tensor) -> Tensor:
        if name == "multi_lora":
            return multi_lora(x, None, *lora, gate, [2.0, 0.5], backend=kernels)
        if name == "router_score":
            return router_score(x.flatten(0, 1), *router, backend=kernels)
        if name == "router_select":
            return router_select(x.flatten(0, 1)[:, :3], threshold, backend=kernels)
        if name == "masked_max_pool":
            return masked_max_pool(x, other > -9.0, backend=kernels)
        return grad_norm_per_sample(x, x * 2.0, method=name, backend=kernels)  # type: ignore[arg-type]

    forward = compiled(op)
    for length in range(5, 25):
        x, other = draw(4, length, FEATURES), draw(4, length)
        found = []
        for function in (op, forward):
            leaf = x.clone().requires_grad_()
            y = function(leaf, other)
            if y.requires_grad:
                y.sum().backward()
            found.append((y.detach(), leaf.grad))
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    assert graphs() <= 2


def test_a_small_transformer_of_another_library() -> None:
    """Its linears replaced by hand, the whole compiled, lengths and active experts changing."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    gates = ExpertGates()
    for path, module in [*model.model.named_modules()]:
        if type(module) is nn.Linear:
            layer = MultiLoRALinear(module, gates=gates)
            for name in NAMES[:4]:
                layer.bank.add(name, 2, alpha=4.0)
                nn.init.normal_(layer.bank.expert(name).lora_b, std=0.1)
            parent, _, place = path.rpartition(".")
            setattr(model.model.get_submodule(parent), place, layer)
    forward = compiled(lambda ids: model(input_ids=ids, use_cache=False).logits)
    generator = torch.Generator().manual_seed(4)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for length in range(3, 43, 4):
        ids = torch.randint(32, (3, length), generator=generator)
        chosen = torch.randperm(4, generator=generator)[: 1 + length % 2 * 3].tolist()
        gate = torch.rand(3, len(chosen), generator=generator)
        with gates.use(gate, [NAMES[i] for i in chosen]):
            one = model(input_ids=ids, use_cache=False).logits
            two = forward(ids)
            torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)
            if length % 7 == 0:
                # Compiled layers compute the experts that are not active too, whose gradients are zero.
                torch.testing.assert_close(
                    torch.autograd.grad(two.square().sum(), parameters),
                    torch.autograd.grad(
                        one.square().sum(), parameters, allow_unused=True, materialize_grads=True
                    ),
                    rtol=1e-3, atol=1e-3,
                )  # fmt: skip
    assert graphs() <= 2
