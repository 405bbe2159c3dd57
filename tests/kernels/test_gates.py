# SPDX-License-Identifier: Apache-2.0
"""Which rows of a layer belong to which sample, against a float64 sum over rows; what a block keeps; copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmole_kernels import ExpertGates, MultiLoRALinear, cpu, use_backend
from dmole_kernels._gate_block import KEPT_BYTES, KEPT_ENTRIES, Rows

NAMES = ("charts", "maps", "films")
FEATURES, OUTPUTS = 8, 6


@pytest.fixture(autouse=True, params=["auto", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_backend(request.param):
        yield


def make_layer(gates: ExpertGates | None, rows: Rows = None, names: Sequence[str] = NAMES) -> MultiLoRALinear:
    torch.manual_seed(0)
    layer = MultiLoRALinear(nn.Linear(FEATURES, OUTPUTS), gates=gates, rows=rows)
    for rank, name in enumerate(names, 2):
        layer.bank.add(name, rank, alpha=4.0)
        nn.init.normal_(layer.bank.expert(name).lora_b)
    return layer


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def row_by_row(
    layer: MultiLoRALinear, x: Tensor, gate: Tensor, owners: Sequence[Any], names: Sequence[str] = NAMES
) -> tuple[Tensor, list[Tensor]]:
    """y and the gradients of sum(y^2) by x, the gate and all A and B, in float64, one row after another; `owners` holds
    for each row of x the index into the gate of its sample (and token)."""
    weight, bias = layer.base.weight.double(), layer.base.bias.double()
    x64, gate64 = x.detach().double().requires_grad_(), gate.detach().double().requires_grad_()
    experts = [layer.bank.expert(name) for name in names]
    pairs = [
        (e.lora_a.detach().double().requires_grad_(), e.lora_b.detach().double().requires_grad_()) for e in experts
    ]
    rows = []
    for row, owner in zip(x64.reshape(-1, x.shape[-1]), owners, strict=True):
        y = weight @ row + bias
        for column, (expert, (a, b)) in enumerate(zip(experts, pairs, strict=True)):
            y = y + gate64[owner][column] * expert.scale * (b @ (a @ row))
        rows.append(y)
    y = torch.stack(rows) if rows else x64.new_zeros(0, OUTPUTS) + 0 * x64.sum() + 0 * gate64.sum()
    y.square().sum().backward()
    expert_grads = [torch.zeros_like(t) if t.grad is None else t.grad for pair in pairs for t in pair]
    return y.detach().view(*x.shape[:-1], OUTPUTS), [x64.grad, gate64.grad, *expert_grads]


def by_layer(
    layer: MultiLoRALinear, gates: ExpertGates, x: Tensor, gate: Tensor, units: Sequence[int] | int | None,
    forward: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    x, gate = x.clone().requires_grad_(), gate.clone().requires_grad_()
    layer.zero_grad()
    with gates.use(gate, NAMES, units=units):
        y = (forward or layer)(x)
        y.square().sum().backward()
    experts = [layer.bank.expert(name) for name in NAMES]
    found = [x.grad, gate.grad, *(t.grad for e in experts for t in (e.lora_a, e.lora_b))]
    return y.detach(), found


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5, check_dtype=False)


@dataclass(frozen=True, kw_only=True)
class Case:
    leading: tuple[int, ...]
    owners: list[Any]  # of each row, flattened
    samples: int = 3
    units: Sequence[int] | int | None = None
    rows: Rows = None
    tokens: tuple[int, ...] = ()


def times(owners: Sequence[int], repeat: int) -> list[int]:
    return [owner for owner in owners for _ in range(repeat)]


CASES = {
    "samples": Case(leading=(3, 4), owners=times([0, 1, 2], 4)),
    "samples_without_tokens": Case(leading=(3,), owners=[0, 1, 2]),
    "samples_of_image_grids": Case(leading=(3, 2, 5), owners=times([0, 1, 2], 10)),
    "samples_declared": Case(leading=(3, 4), rows="samples", owners=times([0, 1, 2], 4)),
    "three_images_of_three_samples": Case(leading=(3, 4), units=[2, 0, 1], owners=times([0, 0, 2], 4)),
    "images_declared": Case(leading=(3, 4), units=[2, 0, 1], rows="units", owners=times([0, 0, 2], 4)),
    "samples_beside_images": Case(leading=(3, 4), units=[2, 0, 1], rows="samples", owners=times([0, 1, 2], 4)),
    "beams_beside_images": Case(leading=(6, 4), units=[2, 0, 1], rows="samples", owners=times([0, 0, 1, 1, 2, 2], 4)),
    "tiles": Case(leading=(6, 4), units=[2, 0, 1], owners=times([0, 0, 0, 0, 2, 2], 4)),
    "windows": Case(leading=(9, 2), units=1, owners=times([0, 1, 2], 6)),
    "grids_of_windows": Case(leading=(6, 2, 2), units=[0, 1, 1], owners=times([1, 2], 12)),
    "flat_patches": Case(leading=(10,), units=[4, 0, 6], owners=[0] * 4 + [2] * 6),
    "flat_patches_merged": Case(leading=(5,), units=[4, 0, 6], owners=[0, 0, 2, 2, 2]),
    "flat_patches_in_dimension_1": Case(leading=(1, 10), units=[4, 0, 6], owners=[0] * 4 + [2] * 6),
    "patches_with_heads_in_dimension_1": Case(leading=(1, 5, 2), units=[4, 0, 6], owners=times([0, 0, 2, 2, 2], 2)),
    "flattened_mlp": Case(leading=(12,), units=1, owners=times([0, 1, 2], 4)),
    "beams": Case(leading=(6, 1), units=1, owners=[0, 0, 1, 1, 2, 2]),
    "beams_and_return_sequences": Case(leading=(18, 2), units=1, owners=times([0, 1, 2], 12)),
    "one_sample": Case(samples=1, leading=(1, 5), units=1, owners=[0] * 5),
    "one_sample_one_token": Case(samples=1, leading=(1, 1), units=[3], owners=[0]),
    "two_samples_packed_into_one_sequence": Case(samples=2, leading=(1, 6), units=1, owners=times([0, 1], 3)),
    "vector": Case(samples=1, leading=(), owners=[0]),
    "vector_with_units": Case(samples=1, leading=(), units=[2], owners=[0]),
    "no_images": Case(leading=(0, 4), units=[0, 0, 0], owners=[]),
    "no_images_flat": Case(leading=(0,), units=[0, 0, 0], owners=[]),
    "no_samples": Case(samples=0, leading=(0, 4), owners=[]),
    "no_samples_with_units": Case(samples=0, leading=(0, 4), units=[], owners=[]),
    "token_gates": Case(leading=(3, 2), tokens=(2,), owners=[(s, t) for s in range(3) for t in range(2)]),
    "token_gates_of_beams": Case(
        leading=(6, 2), tokens=(2,), units=1, owners=[(s // 2, t) for s in range(6) for t in range(2)]
    ),
    "token_gates_of_images": Case(
        leading=(3, 2), tokens=(2,), units=[2, 0, 1], owners=[(s, t) for s in (0, 0, 2) for t in range(2)]
    ),
    "token_gates_of_image_grids": Case(
        leading=(3, 2, 2), tokens=(2,), units=[2, 0, 1], owners=[(s, t) for s in (0, 0, 2) for t in (0, 0, 1, 1)]
    ),
    "token_gates_of_one_sample": Case(
        samples=1, leading=(1, 4), tokens=(4,), units=1, owners=[(0, t) for t in range(4)]
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rows_belong_to_the_samples_that_the_units_declare(case: Case) -> None:
    gates = ExpertGates()
    layer = make_layer(gates, case.rows)
    x, gate = draw(*case.leading, FEATURES), draw(case.samples, *case.tokens, 3, seed=1)
    y, grads = by_layer(layer, gates, x, gate, case.units)
    expected, expected_grads = row_by_row(layer, x, gate, case.owners)
    close(y, expected)
    close(grads, expected_grads)
    # A constant gate, zeros among it, with and without gradients: the row map of the cpu backend is another one.
    gate = torch.where(gate > 0.3, gate, 0.0)
    expected, expected_grads = row_by_row(layer, x, gate, case.owners)
    for _ in range(2):
        for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
            with mode(), gates.use(gate, NAMES, units=case.units):
                close(layer(x), expected)


def test_units_may_be_a_tensor_or_numbers_of_numpy() -> None:
    gates = ExpertGates()
    layer = make_layer(gates)
    x, gate = draw(3, 4, FEATURES), draw(3, 3, seed=1)
    expected, _ = row_by_row(layer, x, gate, CASES["three_images_of_three_samples"].owners)
    for units in (torch.tensor([2, 0, 1]), torch.tensor([2, 0, 1]).numpy(), (2, 0, 1)):
        with gates.use(gate, NAMES, units=units):  # type: ignore[arg-type]
            close(layer(x), expected)


def test_a_vector_is_a_row_as_in_linear() -> None:
    layer, x = make_layer(None), draw(FEATURES)
    for gate in (draw(1, 3, seed=1), torch.tensor([[0.0, 1.0, 0.0]])):
        y = layer(input=x, gate=gate)
        assert y.shape == layer.base(x).shape
        close(y, row_by_row(layer, x, gate, [0])[0])


@pytest.mark.parametrize("leading", [(5, 4), (4, 4), (1, 5), (2,), (1, 1, 6)], ids=str)
def test_rows_that_the_units_do_not_divide_are_an_error(leading: tuple[int, ...]) -> None:
    gates = ExpertGates()
    layer = make_layer(gates)
    place = 1 if leading[0] == 1 else 0
    with (
        gates.use(torch.ones(3, 3), NAMES, units=[2, 0, 1]),
        pytest.raises(ValueError, match=rf"x has {leading[place]} rows along dimension {place} for units \[2, 0, 1\]"),
    ):
        layer(draw(*leading, FEATURES))


def test_rows_without_any_unit_are_an_error() -> None:
    gates = ExpertGates()
    layer = make_layer(gates)
    with (
        gates.use(torch.ones(2, 3), NAMES, units=[0, 0]),
        pytest.raises(ValueError, match=r"x has 2 rows along dimension 0 for units \[0, 0\]"),
    ):
        layer(draw(2, 4, FEATURES))


def test_a_layer_whose_rows_are_not_samples_raises_without_units() -> None:
    """Three images of three samples, owned by [0, 0, 2]: as many rows as samples is no evidence."""
    gates = ExpertGates()
    layer = make_layer(gates, "units")
    with (
        gates.use(torch.ones(3, 3), NAMES),
        pytest.raises(ValueError, match=r"the rows of this layer are not samples .* the block has no units"),
    ):
        layer(draw(3, 4, FEATURES))


@pytest.mark.parametrize("leading", [(4, 4), (12,), (6, 2), (1, 3), ()], ids=str)
def test_without_units_the_leading_dimension_is_the_samples(leading: tuple[int, ...]) -> None:
    gates = ExpertGates()
    layer = make_layer(gates)
    with gates.use(torch.ones(3, 3), NAMES), pytest.raises(ValueError, match=r"gate has shape \(3, 3\) and x \("):
        layer(draw(*leading, FEATURES))


def test_token_gates_do_not_fit_flattened_rows() -> None:
    gates = ExpertGates()
    layer = make_layer(gates)
    for leading in ((12,), (3, 5), (1, 12)):
        with (
            gates.use(torch.ones(3, 4, 3), NAMES, units=1),
            pytest.raises(ValueError, match="for token gates with units|a whole number of rows"),
        ):
            layer(draw(*leading, FEATURES))


@pytest.mark.parametrize(
    "units", [[1, 1], [1, -1, 1], [1, 1.5, 1], [True, True, True], True, ["a", "b", "c"], [1.0, 1.0, 1.0]], ids=str
)
def test_units_are_a_whole_number_per_sample(units: Any) -> None:
    gates = ExpertGates()
    layer = make_layer(gates)
    with pytest.raises(ValueError, match="for 3 samples; expected one whole number of at least 0 per sample"):
        gates.use(torch.ones(3, 3), layer.bank.names, units=units)


def kept(block: Any) -> int:
    """Bytes of the tensors that a block keeps for its layers."""
    tensors = [t for entry in block._kept.values() for t in (entry.gate, entry.row_map and entry.row_map.table)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


@pytest.mark.parametrize("trained", [False, True], ids=["constant", "trained"])
def test_what_a_block_keeps_is_bounded(trained: bool) -> None:
    """4,000 generated lengths under one gate, as a decoder without a cache calls its layers."""
    gates = ExpertGates()
    names = ("only", *NAMES)
    layer = make_layer(gates, names=names)
    gate = torch.ones(4, 4, requires_grad=trained)
    with torch.no_grad(), gates.use(gate, names, units=1):
        block = gates.block
        assert block is not None
        for length in range(1, 4001):
            block.for_layer(layer.bank.names, (4, length), None, torch.device("cpu"), cpu.EXTENSION is not None)
            if length % 500 == 0:
                assert kept(block) <= KEPT_BYTES
        assert len(block._kept) <= KEPT_ENTRIES
        assert kept(block) > 0
        x, experts = draw(4, 3, FEATURES), [layer.bank.expert(name) for name in names]
        close(layer(x), layer.base(x) + sum(x @ e.lora_a.t() @ e.lora_b.t() * e.scale for e in experts))
        # One entry larger than all of it is not kept at all.
        block.for_layer(layer.bank.names, (4, KEPT_BYTES // 32), None, torch.device("cpu"), cpu.EXTENSION is not None)
        assert kept(block) <= KEPT_BYTES
    assert not block._kept


@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_made_inside_a_block_has_gates_of_its_own(through: Callable[[nn.Module], Any]) -> None:
    gates = ExpertGates()
    model = nn.ModuleList([make_layer(gates), make_layer(gates)])
    x, gate = draw(3, 4, FEATURES), draw(3, 3, seed=1)
    with gates.use(gate, NAMES):
        expected = model[0](x)
        other = through(model)
        for layer in other:
            with pytest.raises(ValueError, match="the layer's gates are a copy, and the open block belongs to the ori"):
                layer(x)
        own = other[0].gates
        assert own is other[1].gates
        assert own is not gates
        assert own.names == NAMES
        with own.use(gate, NAMES):
            assert torch.equal(other[1](x), model[1](x))
            assert torch.equal(other[0](x), expected)
        assert torch.equal(model[0](x), expected)
    assert torch.equal(other[0](x), model[0].base(x))
    # And the reverse: a block of the copy does not gate the original.
    with own.use(gate, NAMES), pytest.raises(ValueError, match="the layer's gates are a copy"):
        model[0](x)


def test_the_gates_of_a_block_are_copied_with_its_model_under_another_dtype() -> None:
    """Gates and layers in one object, such as a trainer: the copy's layers listen to the copy's gates."""
    gates = ExpertGates()
    holder = {"gates": gates, "layer": make_layer(gates)}
    other = copy.deepcopy(holder)
    assert other["layer"].gates is other["gates"]
    x = draw(3, 4, FEATURES)
    with other["gates"].use(torch.ones(3, 3), NAMES):
        close(other["layer"](x), row_by_row(other["layer"], x, torch.ones(3, 3), times([0, 1, 2], 4))[0])
