# SPDX-License-Identifier: Apache-2.0
"""Deliberately broken kernels of every backend: the error rule must catch each one, in float32 and in bfloat16."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dmole_kernels import BACKENDS, reference
from dmole_kernels._lora_call import LoraCall, Wanted
from dmole_kernels._multi_lora import BACKWARD, FORWARD
from dmole_kernels.testing import WORKLOADS, LoraInputs, Results, judge_run, rejected, run_kernels, run_reference

Pair = tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, ...]]]
Break = Callable[[Pair], Pair]
Arguments = dict[str, Any]


def with_arguments(change: Callable[[Arguments], Arguments], *, forward: bool = True, backward: bool = True) -> Break:
    """The kernels called with changed arguments: they read the wrong thing."""

    def changed(call: LoraCall, **others: object) -> Arguments:
        fields = {field.name: getattr(call, field.name) for field in dataclasses.fields(call)}
        return change(fields | others)

    def broken(pair: Pair) -> Pair:
        def broken_forward(call: LoraCall) -> tuple[Tensor, Tensor]:
            return pair[0](LoraCall(**changed(call)) if forward else call)

        def broken_backward(call: LoraCall, grad: Tensor, shrunk: Tensor, wanted: Wanted) -> tuple[Tensor, ...]:
            if not backward:
                return pair[1](call, grad, shrunk, wanted)
            named = changed(call, wanted=wanted)
            wanted = named.pop("wanted")
            return pair[1](LoraCall(**named), grad, shrunk, wanted)

        return broken_forward, broken_backward

    return broken


def with_results(place: int, change: Callable[[Tensor], Tensor]) -> Break:
    """The kernels with one result of backward changed: they write the wrong thing."""

    def broken(pair: Pair) -> Pair:
        def broken_backward(*arguments: Any) -> tuple[Tensor, ...]:
            results = list(pair[1](*arguments))
            if results[place].numel():
                results[place] = change(results[place])
            return tuple(results)

        return pair[0], broken_backward

    return broken


def with_output(change: Callable[[Tensor], Tensor]) -> Break:
    """The kernels with forward's y changed."""

    def broken(pair: Pair) -> Pair:
        def broken_forward(call: LoraCall) -> tuple[Tensor, Tensor]:
            y, shrunk = pair[0](call)
            return change(y), shrunk

        return broken_forward, pair[1]

    return broken


def zero_last(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [*tensors[:-1], torch.zeros_like(tensors[-1])]


def one_rank_short(tensors: Sequence[Tensor]) -> list[Tensor]:
    shortened = [tensor.clone() for tensor in tensors]
    shortened[-1][-1] = 0
    return shortened


def neighbours_gate(gate: Tensor) -> Tensor:
    return gate.roll(1, 0)


def last_row_zero(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed.view(-1, tensor.shape[-1])[-1] = 0
    return changed


def last_column_unwritten(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed[..., -1] = float("nan")
    return changed


def through_half_the_mantissa(y: Tensor) -> Tensor:
    """As a tile held in half the mantissa on its way to memory."""
    coarse = torch.bfloat16 if y.dtype == torch.float32 else torch.float8_e4m3fn
    return y.to(coarse).to(y.dtype)


def without_ragged_tail(y: Tensor) -> Tensor:
    rows = y.view(-1, y.shape[-1])
    if rows.shape[0] % 4:
        rows[-(rows.shape[0] % 4) :] = 0
    return y


BROKEN: dict[str, Break] = {
    "last_expert_missing": with_arguments(lambda a: a | {"lora_b": zero_last(a["lora_b"])}, backward=False),
    "last_rank_missing": with_arguments(lambda a: a | {"lora_a": one_rank_short(a["lora_a"])}, backward=False),
    "gate_ignored": with_arguments(lambda a: a | {"gate": torch.ones_like(a["gate"])}),
    "gate_as_a_switch": with_arguments(lambda a: a | {"gate": (a["gate"] != 0).to(a["gate"].dtype)}),
    "gate_without_sign": with_arguments(lambda a: a | {"gate": a["gate"].abs()}),
    "gate_of_the_neighbour": with_arguments(lambda a: a | {"gate": neighbours_gate(a["gate"])}),
    "gate_columns_swapped": with_arguments(lambda a: a | {"gate": a["gate"].flip(1)}),
    "scale_ignored": with_arguments(lambda a: a | {"scale": [1.0] * len(a["scale"])}),
    "one_scale_for_all": with_arguments(lambda a: a | {"scale": [a["scale"][0]] * len(a["scale"])}),
    "backward_ungated": with_arguments(lambda a: a | {"gate": torch.ones_like(a["gate"])}, forward=False),
    "ragged_tail_not_written": with_output(without_ragged_tail),
    "accumulates_in_low_precision": with_output(through_half_the_mantissa),
    "mask_of_another_seed_in_backward": with_arguments(
        lambda a: a | {"seed": None if a["seed"] is None else a["seed"] + 1}, forward=False
    ),
    "no_dropout_in_backward": with_arguments(lambda a: a | {"dropout": 0.0}, forward=False),
    "no_dropout_at_all": with_arguments(lambda a: a | {"dropout": 0.0}),
    "shared_mask_in_backward_only": with_arguments(lambda a: a | {"per_expert": False}, forward=False),
    "dx_without_frozen_experts": with_arguments(
        lambda a: a | {"lora_a": [w * t for w, t in zip(a["lora_a"], a["wanted"].experts, strict=True)]}, forward=False
    ),
    "dx_last_row_missing": with_results(0, last_row_zero),
    "dx_last_column_unwritten": with_results(0, last_column_unwritten),
    "dx_halved": with_results(0, lambda dx: dx / 2),
    "da_last_row_missing": with_results(1, last_row_zero),
    "da_added_twice": with_results(1, lambda da: da * 2),
    "db_last_column_unwritten": with_results(2, last_column_unwritten),
    "db_rows_rotated": with_results(2, lambda db: db.roll(1, 0) if db.shape[0] > 1 else -db),
    "dgate_without_last_expert": with_results(3, lambda dg: dg * torch.eye(dg.shape[1], dtype=dg.dtype)[0]),
    "dgate_mean_for_sum": with_results(3, lambda dg: dg / 2),
}


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("cpu", "reference")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_kernel_is_caught(name: str, dtype: torch.dtype, backend: str) -> None:
    forward, backward = BROKEN[name]((FORWARD[backend], BACKWARD[backend]))

    def run(inputs: LoraInputs) -> Results:
        return run_kernels(forward, backward, inputs)

    assert any(rejected(judge_run(run, workload, dtype, draws=1)) for workload in WORKLOADS)


def test_the_set_is_large_enough_and_the_rule_spares_the_reference() -> None:
    assert len(BROKEN) >= 15
    for workload in WORKLOADS:
        assert not rejected(judge_run(run_reference, workload, torch.float32))


def test_base_and_delta_together_would_hide_a_missing_expert() -> None:
    """Why the rule looks at the delta alone: a small expert under a large base is lost in bfloat16 rounding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator).bfloat16()
    base = 8 * torch.randn(64, 48, generator=generator).bfloat16()
    a = torch.randn(4, 32, generator=generator).bfloat16() / 16
    b = torch.randn(48, 4, generator=generator).bfloat16() / 64
    gate = torch.ones(64, 1, dtype=torch.bfloat16)
    arguments = ([a], [b], gate, [1.0], 0.0, False, None)
    forward = reference.multi_lora_forward
    exact = base.double() + forward(LoraCall(x.double(), None, [a.double()], [b.double()], *arguments[2:]))[0]
    reference_error = forward(LoraCall(x, base, *arguments))[0].double() - exact
    without_expert = base.double() - exact
    assert without_expert.square().mean(1).sqrt().max() <= 2 * reference_error.square().mean(1).sqrt().max()
