# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmole_kernels import ExpertGates, MultiLoRALinear, frozen_linear, use_backend


@pytest.fixture(autouse=True, params=["auto", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_backend(request.param):
        yield


def make_layer(
    gates: ExpertGates | None = None, *, dropout: float = 0.0, base: nn.Linear | None = None
) -> MultiLoRALinear:
    torch.manual_seed(0)
    layer = MultiLoRALinear(base if base is not None else nn.Linear(20, 12), gates=gates, dropout=dropout)
    for name, rank in (("charts", 4), ("maps", 3), ("films", 5)):
        layer.bank.add(name, rank, alpha=8.0, trainable=name == "films")
        nn.init.normal_(layer.bank.expert(name).lora_b)
    return layer


def delta(layer: MultiLoRALinear, x: Tensor, name: str) -> Tensor:
    expert = layer.bank.expert(name)
    return x @ expert.lora_a.t() @ expert.lora_b.t() * expert.scale


def base_output(layer: MultiLoRALinear, x: Tensor) -> Tensor:
    return frozen_linear(x, layer.base.weight, layer.base.bias)


X = torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(1))


def test_is_a_drop_in_for_linear() -> None:
    base = nn.Linear(20, 12)
    layer = MultiLoRALinear(base)
    assert (layer.in_features, layer.out_features) == (20, 12)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert not any(p.requires_grad for p in layer.base.parameters())


def test_without_an_active_expert_it_is_the_base_and_runs_nothing_else() -> None:
    gates = ExpertGates()
    layer = make_layer(gates, dropout=0.5)
    elsewhere = MultiLoRALinear(nn.Linear(2, 2), gates=gates)
    elsewhere.bank.add("elsewhere", rank=1, alpha=1.0)
    exact = base_output(layer, X)
    state = torch.get_rng_state()
    assert torch.equal(layer(X), layer.base(X))
    with gates.use(torch.zeros(3, 2), ["charts", "films"]):
        assert not gates.active
        assert torch.equal(layer(X), layer.base(X))
    with gates.use(torch.ones(3, 1), ["elsewhere"]):
        assert gates.active
        y = layer(X)
        assert torch.equal(y, exact)
        # The base's own output itself: no copy, no graph, no seed drawn.
        assert y.grad_fn is None
    assert torch.equal(torch.get_rng_state(), state)


def test_sample_gates_name_experts_and_skip_those_not_held() -> None:
    gates = ExpertGates()
    layer = make_layer(gates)
    elsewhere = MultiLoRALinear(nn.Linear(2, 2), gates=gates)
    elsewhere.bank.add("nowhere", rank=1, alpha=1.0)
    gate = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.5], [0.0, 0.0, 0.0]])
    with gates.use(gate, ["films", "nowhere", "charts"]):
        y = layer(X)
    weights = gate[:, None, :]
    expected = (
        base_output(layer, X)
        + weights[..., :1] * delta(layer, X, "films")
        + weights[..., 2:] * delta(layer, X, "charts")
    )
    torch.testing.assert_close(y, expected)
    assert torch.equal(y[2], base_output(layer, X)[2])


def test_token_gates() -> None:
    layer = make_layer()
    gate = torch.randn(3, 5, 3)
    expected = base_output(layer, X) + sum(
        gate[..., e, None] * delta(layer, X, name) for e, name in enumerate(layer.bank.names)
    )
    torch.testing.assert_close(layer(X, gate), expected)


def test_an_explicit_gate_overrides_the_ambient_one() -> None:
    gates = ExpertGates()
    layer = make_layer(gates)
    with gates.use(torch.ones(3, 1), ["charts"]):
        y = layer(X, torch.ones(3, 1), ["maps"])
    torch.testing.assert_close(y, base_output(layer, X) + delta(layer, X, "maps"))


def test_gates_nest_and_survive_exceptions() -> None:
    gates = ExpertGates()
    layer = make_layer(gates)
    with gates.use(torch.ones(3, 1), ["charts"]):
        with pytest.raises(KeyError), gates.use(torch.ones(3, 1), ["maps"]):
            torch.testing.assert_close(layer(X), base_output(layer, X) + delta(layer, X, "maps"))
            raise KeyError
        torch.testing.assert_close(layer(X), base_output(layer, X) + delta(layer, X, "charts"))
        with gates.use(torch.zeros(3, 1), ["charts"]):
            assert torch.equal(layer(X), base_output(layer, X))
    assert not gates.active
    assert torch.equal(layer(X), base_output(layer, X))


def test_one_host_synchronisation_serves_all_layers() -> None:
    gates = ExpertGates()
    layers = [make_layer(gates) for _ in range(3)]
    with gates.use(torch.tensor([[0.0, 1.0]] * 3), ["charts", "films"]) as _:
        block = gates.block
        assert block is not None
        assert block.active == ("films",)
        for layer in layers:
            layer(X)
        assert len(block._kept) == 1


def test_a_gate_that_is_trained_keeps_its_zeros_active() -> None:
    layer = make_layer()
    gate = torch.tensor([[0.0, 1.0]] * 3, requires_grad=True)
    layer(X, gate, ["charts", "maps"]).sum().backward()
    expected = [delta(layer, X[0], name).sum() for name in ("charts", "maps")]
    torch.testing.assert_close(gate.grad[0], torch.stack(expected))


def test_gradients_reach_the_trainable_expert_and_x_only() -> None:
    gates = ExpertGates()
    layer = make_layer(gates, dropout=0.1)
    x = X.clone().requires_grad_()
    with gates.use(torch.ones(3, 2), ["charts", "films"]):
        layer(x).square().sum().backward()
    with_gradient = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert with_gradient == {"bank.experts.films.lora_a", "bank.experts.films.lora_b"}
    assert x.grad.abs().sum() > 0


def test_dropout_only_in_training_and_repeated_by_the_generator_s_state() -> None:
    layer = make_layer(dropout=0.5)
    gate = torch.ones(3, 3)
    torch.manual_seed(1)
    first = layer(X, gate)
    assert not torch.equal(first, layer(X, gate))
    torch.manual_seed(1)
    assert torch.equal(first, layer(X, gate))
    layer.eval()
    state = torch.get_rng_state()
    assert torch.equal(layer(X, gate), layer(X, gate))
    assert torch.equal(state, torch.get_rng_state())


def step(layer: MultiLoRALinear, forward: object, gates: ExpertGates) -> list[Tensor]:
    x = X.clone().requires_grad_()
    layer.zero_grad()
    torch.manual_seed(5)
    with gates.use(torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]), ["charts", "films"]):
        y = forward(x)  # type: ignore[operator]
        y.square().sum().backward()
    films = layer.bank.expert("films")
    return [y.detach(), x.grad, films.lora_a.grad, films.lora_b.grad]


def test_compiles_without_graph_breaks_and_gives_the_same_bits() -> None:
    gates = ExpertGates()
    layer = make_layer(gates, dropout=0.3)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    # The compiled layer adds up all its experts, zeros included: another order of sums.
    for eager, traced in zip(step(layer, layer, gates), step(layer, compiled, gates), strict=True):
        torch.testing.assert_close(eager, traced, rtol=1e-4, atol=1e-4)
    assert torch.equal(compiled(X), base_output(layer, X))
    # An explicit gate's values cannot be looked at while compiling: all its experts count, zeros add zero.
    gate = torch.tensor([[0.0, 1.0]] * 3)
    layer.eval()
    torch.testing.assert_close(compiled(X, gate, ["maps", "films"]), layer(X, gate, ["maps", "films"]))


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved_tensor_hooks", "reentrant"])
def test_gradient_checkpointing_inside_the_block(reentrant: bool) -> None:
    gates = ExpertGates()
    layer = make_layer(gates, dropout=0.3)
    plain = step(layer, layer, gates)
    again = step(layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant), gates)
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))


def test_gradient_checkpointing_with_backward_outside_the_block() -> None:
    gates = ExpertGates()
    layer = make_layer(gates, dropout=0.3)
    x = X.clone().requires_grad_()
    with gates.use(torch.ones(3, 1), ["films"]):
        y = checkpoint(layer, x, use_reentrant=False, context_fn=gates.checkpoint_contexts)
    y.square().sum().backward()
    assert layer.bank.expert("films").lora_a.grad is not None
    assert gates.block is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
def test_model_dtypes(dtype: torch.dtype) -> None:
    layer = make_layer(base=nn.Linear(20, 12, dtype=dtype))
    y = layer(X.to(dtype), torch.ones(3, 1), ["films"])
    y.float().square().sum().backward()
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert (y.dtype, layer.bank.expert("films").lora_a.grad.dtype) == (dtype, expected)


def test_autocast() -> None:
    layer = make_layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(X, torch.ones(3, 1), ["films"])
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.bank.expert("films").lora_a.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), base_output(layer, X) + delta(layer, X, "films"), rtol=0.05, atol=0.05)


def test_autocast_casts_x_once_for_base_and_experts() -> None:
    layer = make_layer(dropout=0.3)
    gate = torch.ones(3, 1)
    seen: list[Tensor] = []
    watch = layer.base.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    def run(forward: object) -> list[Tensor]:
        x = X.clone().requires_grad_()
        layer.zero_grad()
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = forward(x, gate, ["films"])  # type: ignore[operator]
        y.float().square().sum().backward()
        films = layer.bank.expert("films")
        return [y.detach(), x.grad, films.lora_a.grad, films.lora_b.grad]

    eager = run(layer)
    # Without experts the base sees what it always saw.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(X)
    assert [x.dtype for x in seen] == [torch.bfloat16, torch.float32]
    watch.remove()
    assert eager[1].dtype == torch.float32
    torch._dynamo.reset()
    compiled = run(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(one, two) for one, two in zip(eager, compiled, strict=True))


def test_strided_x_no_samples_and_deeper_leading_dimensions() -> None:
    layer = make_layer()
    strided = torch.randn(5, 3, 20).transpose(0, 1)
    gate = torch.rand(3, 3)
    torch.testing.assert_close(layer(strided, gate), layer(strided.contiguous(), gate))
    assert layer(X[:0], gate[:0]).shape == (0, 5, 12)
    torch.testing.assert_close(layer(X[:, :, None], gate)[:, :, 0], layer(X, gate))


def test_a_copied_model_keeps_its_layers_on_one_set_of_gates() -> None:
    gates = ExpertGates()
    model = nn.ModuleList([make_layer(gates), make_layer(gates)])
    other = copy.deepcopy(model)
    assert other[0].gates is other[1].gates
    assert other[0].gates is not gates


def test_state_dict_of_a_model_holds_tensors_only() -> None:
    layer = make_layer()
    assert all(isinstance(value, Tensor) for value in layer.state_dict().values())
    other = MultiLoRALinear(nn.Linear(20, 12))
    other.bank.restore(layer.bank.describe())
    other.load_state_dict(layer.state_dict())
    gate = torch.rand(3, 3)
    assert torch.equal(other(X, gate), layer(X, gate))


def test_errors_tell_what_to_do() -> None:
    gates = ExpertGates()
    layer = make_layer(gates)
    with pytest.raises(ValueError, match=r"gate has shape \(3, 2\) for experts \['charts'\]; expected \[samples, 1\]"):
        gates.use(torch.ones(3, 2), ["charts"]).__enter__()
    with pytest.raises(ValueError, match="distinct names. Give each expert one column"):
        layer(X, torch.ones(3, 2), ["charts", "charts"])
    with (
        gates.use(torch.ones(4, 1), ["charts"]),
        pytest.raises(ValueError, match=r"gate has shape \(4, 1\) and x \(3, 5, '...'\)"),
    ):
        layer(X)
    with pytest.raises(ValueError, match=r"dropout is 1.5; expected a chance in \[0, 1\). Use 0.05"):
        MultiLoRALinear(nn.Linear(2, 2), dropout=1.5)
    with pytest.raises(ValueError, match="dropout_mode is 'each'; expected 'shared' or 'per_expert'"):
        MultiLoRALinear(nn.Linear(2, 2), dropout_mode="each")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend='tpu' is not in this build of dmole_kernels"):
        MultiLoRALinear(nn.Linear(2, 2), backend="tpu")
