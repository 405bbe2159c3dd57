# SPDX-License-Identifier: Apache-2.0
"""The compiled multi-LoRA kernels at every instruction set this machine runs: the error rule, and what is bit-equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmole_kernels import RowMap, cpu, multi_lora, reference
from dmole_kernels._lora_call import LoraCall, Wanted
from dmole_kernels.testing import (
    WORKLOADS,
    LoraInputs,
    Results,
    Workload,
    expected_errors,
    judge,
    judge_run,
    make_inputs,
    multi_lora_loop,
    multi_lora_op,
    poisoned_memory,
    rejected,
    run_autograd,
    run_kernels,
)

pytestmark = pytest.mark.skipif(cpu.EXTENSION is None, reason=f"no compiled extension: {cpu.MISSING}")

LEVELS = cpu.available_isas() if cpu.EXTENSION is not None else ()
BY_NAME = {workload.name: workload for workload in WORKLOADS}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def poisoned_scratch() -> Iterator[None]:
    with poisoned_memory():
        yield


def run_op(inputs: LoraInputs) -> Results:
    return run_autograd(lambda i: multi_lora_op(i, backend="cpu"), inputs)


def without_signs(inputs: LoraInputs) -> LoraInputs:
    return replace(
        inputs,
        x=inputs.x.abs(),
        lora_a=tuple(a.abs() for a in inputs.lora_a),
        lora_b=tuple(b.abs() for b in inputs.lora_b),
        gate=inputs.gate.abs(),
        grad=inputs.grad.abs(),
    )


def run_pair(inputs: LoraInputs) -> Results:
    return run_kernels(cpu.multi_lora_forward, cpu.multi_lora_backward, inputs)


@DTYPES
@pytest.mark.parametrize("workload", WORKLOADS, ids=list(BY_NAME))
def test_error_rule(level: str, workload: Workload, dtype: torch.dtype) -> None:
    assert not rejected(judge_run(run_op, workload, dtype))


@DTYPES
def test_error_rule_beyond_one_tile_and_one_block_of_k(level: str, dtype: torch.dtype) -> None:
    """Several chunks of rows, blocks of k of the long products and blocks of rows of dA, with ragged ends of each."""
    workload = Workload(
        name="", leading=(3, 131), in_features=2111, out_features=157, ranks=(13, 16, 5), pattern="top2", dropout=0.1
    )
    assert not rejected(judge_run(run_op, workload, dtype, draws=1))


@given(
    data=st.data(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    leading=st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple),
    in_features=st.integers(1, 300),
    out_features=st.integers(1, 150),
    ranks=st.lists(st.sampled_from((1, 2, 3, 4, 8, 16, 17, 31)), min_size=1, max_size=5).map(tuple),
    gate=st.sampled_from(("sample", "token")),
    pattern=st.sampled_from(("random", "last_unused", "zero_and_negative")),
    frozen=st.sets(st.integers(0, 4)).map(tuple),
    dropout=st.sampled_from((0.0, 0.05, 0.9)),
    per_expert=st.booleans(),
    contiguous=st.booleans(),
)
def test_any_shape_is_as_near_the_oracle_as_its_dtype_allows(
    data: st.DataObject, dtype: torch.dtype, **drawn: object
) -> None:
    """Not the rule of two: a drawn shape may have one row. Every tensor within two roundings of what its terms add
    up to without their signs: the oracle is a sum of products, so that is its value on absolute values."""
    cpu.set_isa(data.draw(st.sampled_from(LEVELS)))
    try:
        inputs = make_inputs(Workload(name="drawn", **drawn), dtype)  # type: ignore[arg-type]
        actual = run_op(inputs)
        truth = run_autograd(multi_lora_loop, inputs.to(torch.float64))
        terms = run_autograd(multi_lora_loop, without_signs(inputs.to(torch.float64)))
        for verdict in judge(actual, expected_errors(inputs), truth):
            size = float(terms[verdict.name].max()) if terms[verdict.name].numel() else 0.0
            assert verdict.error <= max(verdict.allowed, 2 * torch.finfo(dtype).eps * size), (verdict, size)
    finally:
        cpu.set_isa("auto")


@DTYPES
def test_threads_and_runs_are_bit_equal(level: str, dtype: torch.dtype) -> None:
    workload = Workload(
        name="", leading=(5, 83), in_features=300, out_features=170, ranks=(4, 9, 16), pattern="top2", dropout=0.2
    )
    inputs = make_inputs(workload, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2, 1):
            torch.set_num_threads(count)
            results.append(run_op(inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@DTYPES
@pytest.mark.parametrize("gate", ["sample", "token"])
def test_a_sample_is_bit_equal_whatever_its_batch_mates(level: str, dtype: torch.dtype, gate: str) -> None:
    """Without dropout, whose mask is drawn by row number."""
    workload = Workload(
        name="",
        leading=(7, 29),
        in_features=300,
        out_features=170,
        ranks=(4, 9, 16, 3),
        gate=gate,  # type: ignore[arg-type]
        pattern="top2",
    )
    inputs = make_inputs(workload, dtype)
    whole = run_op(inputs)
    for samples in (slice(0, 1), slice(3, 4), slice(2, 6)):
        alone = run_op(replace(inputs, x=inputs.x[samples], gate=inputs.gate[samples], grad=inputs.grad[samples]))
        for name in ("delta", "dx", "dgate"):
            assert torch.equal(alone[name], whole[name][samples]), name


def test_a_constant_gate_skips_what_it_zeroes_and_changes_nothing_else(level: str) -> None:
    inputs = make_inputs(BY_NAME["sixteen_top2"])
    arguments = (inputs.x, None, list(inputs.lora_a), list(inputs.lora_b), inputs.gate, list(inputs.scale))
    switches = (0.0, False, None)
    y, shrunk = cpu.multi_lora_forward(LoraCall(*arguments, *switches, False))
    y_every, shrunk_every = cpu.multi_lora_forward(LoraCall(*arguments, *switches, True))
    used = torch.repeat_interleave(inputs.gate != 0, torch.tensor([a.shape[0] for a in inputs.lora_a]), 1)
    used = used.repeat_interleave(3, 0)
    assert torch.equal(y, y_every)
    assert torch.equal(shrunk, shrunk_every * used)
    assert not torch.equal(shrunk, shrunk_every)


def test_an_expert_nobody_uses_is_not_read(level: str) -> None:
    inputs = make_inputs(BY_NAME["last_unused"])
    poisoned = replace(
        inputs,
        lora_a=(inputs.lora_a[0], torch.full_like(inputs.lora_a[1], float("nan"))),
        lora_b=(inputs.lora_b[0], torch.full_like(inputs.lora_b[1], float("nan"))),
    )

    def run(i: LoraInputs) -> Tensor:
        return multi_lora(i.x, None, i.lora_a, i.lora_b, i.gate.detach(), i.scale, backend="cpu")

    x = inputs.x.clone().requires_grad_()
    expected, actual = run(inputs), run(replace(poisoned, x=x))
    assert torch.equal(expected, actual)
    actual.backward(inputs.grad)
    assert bool(x.grad.isfinite().all())


def test_a_row_map_names_the_rows_of_each_expert_and_gives_the_same_bits(level: str) -> None:
    gate = torch.tensor([[1.0, 0.0], [2.0, -1.0], [0.0, 0.0]])
    row_map = RowMap(gate, 6)
    assert (row_map.rows_of(0), row_map.rows_of(1)) == ([0, 1, 2, 3], [2, 3])
    assert (row_map.experts_of(0, 2), row_map.experts_of(1, 3), row_map.experts_of(4, 6)) == ([0], [0, 1], [])
    assert row_map.pairs == 6
    inputs = make_inputs(Workload(name="", leading=(3, 2), in_features=20, out_features=9, ranks=(3, 4)))
    arguments = (inputs.x, None, inputs.lora_a, inputs.lora_b, gate, inputs.scale)
    assert torch.equal(multi_lora(*arguments, backend="cpu", row_map=row_map), multi_lora(*arguments, backend="cpu"))


@pytest.mark.parametrize("layout", ["transposed_weights", "strided_weights", "strided_rows", "bfloat16_experts"])
def test_layouts_of_weights_and_x(level: str, layout: str) -> None:
    """Every way of packing gives what contiguous float32 tensors give."""
    inputs = make_inputs(Workload(name="", leading=(4, 5), in_features=70, out_features=45, ranks=(3, 20)))
    if layout == "bfloat16_experts":
        inputs = replace(
            inputs,
            lora_a=tuple(a.bfloat16() for a in inputs.lora_a),
            lora_b=tuple(b.bfloat16() for b in inputs.lora_b),
        )
        expected = run_op(
            replace(
                inputs, lora_a=tuple(a.float() for a in inputs.lora_a), lora_b=tuple(b.float() for b in inputs.lora_b)
            )
        )
        actual = run_op(inputs)
        assert all(torch.equal(actual[name], expected[name].to(actual[name].dtype)) for name in expected)
        return
    change: Callable[[Tensor], Tensor] = {
        "transposed_weights": lambda t: t.t().contiguous().t(),
        "strided_weights": lambda t: torch.stack([t, t], 2)[:, :, 0],
        "strided_rows": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    }[layout]
    changed = replace(
        inputs,
        x=torch.cat([inputs.x, inputs.x], 2)[..., :70],
        lora_a=tuple(map(change, inputs.lora_a)),
        lora_b=tuple(map(change, inputs.lora_b)),
        grad=torch.cat([inputs.grad, inputs.grad], 2)[..., :45],
    )
    expected, actual = run_pair(inputs), run_pair(changed)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_what_is_not_wanted_has_no_elements() -> None:
    inputs = make_inputs(BY_NAME["all_frozen"])
    arguments = (list(inputs.lora_a), list(inputs.lora_b), inputs.gate, list(inputs.scale), 0.0, False, None)
    nothing = cpu.multi_lora_backward(
        LoraCall(None, None, *arguments), inputs.grad, None, Wanted(False, False, [False, False])
    )
    assert [t.numel() for t in nothing] == [0, 0, 0, 0]
    dx, *rest = cpu.multi_lora_backward(
        LoraCall(None, None, *arguments), inputs.grad, None, Wanted(True, False, [False, False])
    )
    assert dx.shape == inputs.x.shape
    assert [t.numel() for t in rest] == [0, 0, 0]


@pytest.mark.parametrize("chance", [0.05, 0.5, 1 - 2**-34])
@pytest.mark.parametrize("per_expert", [False, True], ids=["shared", "per_expert"])
def test_masks_are_philox_s_bits(level: str, chance: float, per_expert: bool) -> None:
    """x = 1, one output per input: A is the identity, so S shows the mask itself."""
    rows, features = 37, 200
    eye = torch.eye(features)
    seed = torch.tensor(2**61 + 99)
    arguments = (
        torch.ones(rows, features),
        None,
        [eye, eye],
        [torch.zeros(1, features)] * 2,
        torch.ones(1, 2),
        [1.0] * 2,
    )
    switches = (chance, per_expert, seed)
    _, shrunk = cpu.multi_lora_forward(LoraCall(*arguments, *switches))
    _, expected = reference.multi_lora_forward(LoraCall(*arguments, *switches))
    assert torch.equal(shrunk != 0, expected != 0)


def test_errors_tell_what_to_do() -> None:
    x, a, b, gate = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(6, 5), torch.ones(2, 1)
    with pytest.raises(
        ValueError, match="backend='cpu' got float64; expected float32 or bfloat16. Cast the tensors or"
    ):
        multi_lora(x.double(), None, [a], [b], gate, [1.0], backend="cpu")
    switches = ([1.0], 0.0, False, None)
    with pytest.raises(ValueError, match="multi_lora: x is Double; the cpu backend expects float32 or bfloat16. Cast"):
        cpu.multi_lora_forward(LoraCall(x.double(), None, [a], [b], gate, *switches))
    with pytest.raises(ValueError, match="an expert's weight is Half; the cpu backend expects float32 or bfloat16"):
        cpu.multi_lora_forward(LoraCall(x, None, [a.half()], [b], gate, *switches))
    with pytest.raises(ValueError, match=r"expert 0 has lora_a \[5, 4\] and lora_b \[6, 4\]; expected \[rank, 4\]"):
        cpu.multi_lora_forward(LoraCall(x, None, [a], [torch.zeros(6, 4)], gate, *switches))
    with pytest.raises(ValueError, match=r"got 1 lora_a, 1 lora_b, 1 scales, gate \[2, 3\]; expected one of each"):
        cpu.multi_lora_forward(LoraCall(x, None, [a], [b], torch.ones(2, 3), *switches))
    with pytest.raises(ValueError, match="gate has 4 rows for 6 rows of x; expected a divisor"):
        cpu.multi_lora_forward(LoraCall(x, None, [a], [b], torch.ones(4, 1), *switches))
    with pytest.raises(ValueError, match=r"base has shape \[2, 3, 7\]; expected \[2, 3, 6\]. Pass the layer's output"):
        cpu.multi_lora_forward(LoraCall(x, torch.zeros(2, 3, 7), [a], [b], gate, *switches))
    with pytest.raises(ValueError, match=r"dropout is 1; expected a chance in \[0, 1\)"):
        cpu.multi_lora_forward(LoraCall(x, None, [a], [b], gate, [1.0], 1.0, False, torch.tensor(1)))
    with pytest.raises(ValueError, match=r"dB and dgate want S \[6, 5\]; pass the forward's"):
        cpu.multi_lora_backward(
            LoraCall(x, None, [a], [b], gate, *switches), torch.zeros(2, 3, 6), None, Wanted(True, False, [True])
        )
    with pytest.raises(ValueError, match=r"dA wants x \[6, 4\]; pass the forward's"):
        cpu.multi_lora_backward(
            LoraCall(None, None, [a], [b], gate, *switches), torch.zeros(2, 3, 6), None, Wanted(True, False, [True])
        )
    with pytest.raises(ValueError, match="row_map is for 4 rows and 1 experts; expected 6 and 1. Build it from this"):
        cpu.multi_lora_forward(LoraCall(x, None, [a], [b], gate, *switches, False, RowMap(gate, 4).table))
    with pytest.raises(ValueError, match="row_map is for 4 rows and x has 6; expected as many. Build the row map from"):
        multi_lora(x, None, [a], [b], gate, [1.0], backend="cpu", row_map=RowMap(gate, 4))
    with pytest.raises(
        ValueError, match=r"row_map: gate has shape \[2, 1\] on cpu for 5 rows; expected \[gates, experts\]"
    ):
        RowMap(gate, 5)
    for expert in (1, -1):
        with pytest.raises(IndexError, match=f"expert is {expert}; expected a column of the gate, 0 to 0"):
            RowMap(gate, 6).rows_of(expert)
    for rows in (2**31 - 2, 2**32):
        with pytest.raises(
            ValueError, match=f"joins {rows} rows and 2 experts in {2 * rows} pairs; expected fewer than"
        ):
            RowMap(torch.ones(2, 2), rows)
    with pytest.raises(ValueError, match="row_map is Long; expected int32. Build it with dmole_kernels"):
        cpu.multi_lora_forward(LoraCall(x, None, [a], [b], gate, *switches, False, RowMap(gate, 6).table.long()))
    with pytest.raises(
        ValueError, match=r"got 0 experts for x \[2, 3, 4\]; expected at least one, and x \[..., features\]"
    ):
        cpu.multi_lora_forward(LoraCall(x, None, [], [], torch.ones(2, 0), [], 0.0, False, None))
    grad = torch.zeros(2, 3, 6)
    shrunk = torch.zeros(6, 5)
    with pytest.raises(
        ValueError, match=r"got 2 trainable flags for 1 experts and grad \[2, 3, 6\]; expected one each"
    ):
        cpu.multi_lora_backward(
            LoraCall(x, None, [a], [b], gate, *switches), grad, shrunk, Wanted(True, False, [True, True])
        )
    with pytest.raises(ValueError, match=r"dA wants x \[6, 4\]; pass the forward's"):
        cpu.multi_lora_backward(
            LoraCall(x[:1], None, [a], [b], gate, *switches), grad, shrunk, Wanted(True, False, [True])
        )
