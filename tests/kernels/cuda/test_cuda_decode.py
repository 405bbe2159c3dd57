# SPDX-License-Identifier: Apache-2.0
"""The decode kernels on the host, held to the error rule, and what is bit-equal."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dmole_kernels import cuda
from dmole_kernels._lora_call import LoraCall
from dmole_kernels.testing import (
    LoraInputs,
    Results,
    Workload,
    expected_errors,
    judge,
    make_inputs,
    multi_lora_loop,
    product_error,
    rejected,
)

pytestmark = pytest.mark.usefixtures("host")
DRAWS = int(os.environ.get("DMOLE_DRAWS", "40"))

WORKLOADS = (
    Workload(name="zero_rows", leading=(0, 5), in_features=8, out_features=6, ranks=(2, 3)),
    Workload(name="zero_tokens", leading=(2, 0), in_features=8, out_features=6, ranks=(2, 3)),
    Workload(name="one_row", leading=(1, 1), in_features=64, out_features=64, ranks=(8, 16)),
    Workload(name="sixteen_rows_top2", leading=(16, 1), in_features=64, out_features=64, ranks=(1, 2, 4, 8) * 4,
             pattern="top2"),
    Workload(name="primes_rank_1_to_128", leading=(13, 1), in_features=37, out_features=53, ranks=(1, 5, 128)),
    Workload(name="token_gates", leading=(3, 5), in_features=31, out_features=67, ranks=(3, 8), gate="token"),
    Workload(name="sample_gates", leading=(3, 5), in_features=48, out_features=130, ranks=(16, 8)),
    Workload(name="forty_experts", leading=(7,), in_features=24, out_features=40, ranks=(1, 2) * 20, pattern="top2"),
    Workload(name="one_active_expert", leading=(5, 3), in_features=16, out_features=24, ranks=(4, 6, 2),
             pattern="one_expert"),
    Workload(name="last_unused", leading=(5, 2), in_features=16, out_features=24, ranks=(4, 6),
             pattern="last_unused"),
    Workload(name="zero_and_negative", leading=(5, 3), in_features=16, out_features=24, ranks=(4, 6),
             pattern="zero_and_negative"),
    Workload(name="strided_x", leading=(4, 3), in_features=33, out_features=12, ranks=(4, 5), contiguous=False),
    Workload(name="long_and_ragged", leading=(5,), in_features=2051, out_features=17, ranks=(3, 8)),
)  # fmt: skip
BY_NAME = {workload.name: workload for workload in WORKLOADS}
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"]
)


def decode(inputs: LoraInputs, base: Tensor | None = None) -> Results:
    """The backend's forward: the delta (on top of the base, if any) and S."""
    gate_GE = inputs.gate.reshape(-1, len(inputs.scale))
    y, s_NR = cuda.multi_lora_forward(
        LoraCall(inputs.x, base, inputs.lora_a, inputs.lora_b, gate_GE, inputs.scale, 0.0, False, None)
    )
    return {"delta": y, "S": s_NR}


def truth(inputs: LoraInputs) -> Results:
    """The definition in float64; S without the rows whose gate is zero."""
    exact = inputs.to(torch.float64)
    return {"delta": multi_lora_loop(exact), "S": opened(exact, (exact.x @ torch.cat(exact.lora_a).t()).flatten(0, -2))}


def expected(inputs: LoraInputs) -> dict[str, float]:
    """The expected errors of the delta, and of S, whose sums are float32 and rounded once."""
    rows = inputs.x.reshape(-1, inputs.x.shape[-1])
    return {
        "delta": expected_errors(inputs)["delta"],
        "S": product_error(rows, torch.cat(inputs.lora_a), inputs.x.dtype) if rows.shape[0] else 0.0,
    }


def opened(inputs: LoraInputs, s_NR: Tensor) -> Tensor:
    gates = inputs.gate.reshape(-1, len(inputs.scale))
    rows = s_NR.shape[0] // max(1, gates.shape[0])
    ranks = torch.tensor([a.shape[0] for a in inputs.lora_a])
    return torch.where((gates != 0).repeat_interleave(rows, 0).repeat_interleave(ranks, 1), s_NR, 0.0)


def drawn(workload: Workload, dtype: torch.dtype, experts: torch.dtype, seed: int = 0) -> LoraInputs:
    """float32 gates, as callers have, and experts of a dtype of their own."""
    inputs = make_inputs(workload, dtype, seed)
    return replace(
        inputs,
        gate=inputs.gate.float(),
        lora_a=tuple(a.to(experts) for a in inputs.lora_a),
        lora_b=tuple(b.to(experts) for b in inputs.lora_b),
    )


def stacked(results: list[Results]) -> Results:
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


def equal(one: Results, other: Results) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@DTYPES
@pytest.mark.parametrize("experts", ["own", "float32"])
@pytest.mark.parametrize("workload", WORKLOADS, ids=list(BY_NAME))
def test_error_rule(workload: Workload, experts: str, dtype: torch.dtype) -> None:
    held = torch.float32 if experts == "float32" else dtype
    inputs = [drawn(workload, dtype, held, seed) for seed in range(4)]
    errors = [expected(i) for i in inputs]
    largest = {name: max(error[name] for error in errors) for name in errors[0]}
    verdicts = judge(stacked([decode(i) for i in inputs]), largest, stacked([truth(i) for i in inputs]))
    assert not rejected(verdicts)


@settings(max_examples=DRAWS, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    wide=st.booleans(),
    leading=st.sampled_from(((1,), (3, 5), (16,), (2, 8), (2, 2, 3), (11, 1))),
    in_features=st.integers(1, 300),
    out_features=st.integers(1, 150),
    ranks=st.lists(st.sampled_from((1, 2, 3, 4, 8, 16, 17, 31)), min_size=1, max_size=5).map(tuple),
    gate=st.sampled_from(("sample", "token")),
    pattern=st.sampled_from(("random", "last_unused", "zero_and_negative")),
    contiguous=st.booleans(),
)
def test_any_shape_is_as_near_the_truth_as_its_dtype_allows(dtype: torch.dtype, wide: bool, **shape: object) -> None:
    """Not the rule of two: a drawn shape may have one row. Every tensor within a few roundings of its own size."""
    inputs = drawn(Workload(name="drawn", **shape), dtype, torch.float32 if wide else dtype)  # type: ignore[arg-type]
    exact = truth(inputs)
    for verdict in judge(decode(inputs), expected(inputs), exact):
        size = float(exact[verdict.name].abs().max())
        assert verdict.error <= max(verdict.allowed, 8 * torch.finfo(dtype).eps * size), (verdict, size)


@DTYPES
@pytest.mark.parametrize("name", ["sixteen_rows_top2", "primes_rank_1_to_128", "forty_experts", "long_and_ragged"])
def test_the_order_of_threads_and_blocks_changes_no_bit(host: Any, name: str, dtype: torch.dtype) -> None:
    inputs = drawn(BY_NAME[name], dtype, dtype)
    forward = decode(inputs)
    for kind, seed in (("reverse", 0), ("shuffled", 1), ("shuffled", 2)):
        with host.order(kind, seed):
            assert equal(decode(inputs), forward), kind


@DTYPES
@pytest.mark.parametrize("features", [64, 37, 2051])
@pytest.mark.parametrize("gate", ["sample", "token"])
def test_a_row_is_bit_equal_whatever_its_batch_mates(gate: str, features: int, dtype: torch.dtype) -> None:
    """An odd number of features: alone, a row begins at another alignment than in its batch."""
    shape = Workload(
        name="", leading=(8, 2), in_features=features, out_features=70, ranks=(4, 16, 3), gate=gate, pattern="top2"  # type: ignore[arg-type]
    )  # fmt: skip
    inputs = drawn(shape, dtype, dtype)
    whole = decode(inputs)
    for samples in (slice(0, 1), slice(3, 4), slice(2, 7)):
        alone = decode(replace(inputs, x=inputs.x[samples], gate=inputs.gate[samples]))
        assert torch.equal(alone["delta"], whole["delta"][samples])
        assert torch.equal(alone["S"], whole["S"][2 * samples.start : 2 * samples.stop])
    for row in range(2):
        gates = inputs.gate[5:6] if gate == "sample" else inputs.gate[5:6, row]
        alone = decode(replace(inputs, x=inputs.x[5:6, row], gate=gates))
        assert torch.equal(alone["delta"], whole["delta"][5:6, row])


@DTYPES
def test_alignment_changes_the_loads_and_no_bit(dtype: torch.dtype) -> None:
    """x, A and B moved by one element, which forbids wide loads."""
    inputs = drawn(BY_NAME["sixteen_rows_top2"], dtype, dtype)
    inputs = replace(inputs, lora_a=inputs.lora_a[3::4], lora_b=inputs.lora_b[3::4], gate=inputs.gate[..., 3::4] + 1.0,
                     scale=inputs.scale[3::4])  # fmt: skip

    def moved(tensor: Tensor) -> Tensor:
        place = torch.empty(tensor.numel() + 1, dtype=dtype)[1:].view(tensor.shape)
        return place.copy_(tensor)

    narrow = replace(
        inputs,
        x=moved(inputs.x),
        lora_a=tuple(map(moved, inputs.lora_a)),
        lora_b=tuple(map(moved, inputs.lora_b)),
    )
    assert narrow.x.data_ptr() % 16 and not inputs.x.data_ptr() % 16
    assert equal(decode(narrow), decode(inputs))


@DTYPES
def test_an_expert_is_read_by_the_rows_that_use_it_alone(dtype: torch.dtype) -> None:
    inputs = drawn(BY_NAME["last_unused"], dtype, dtype)
    poison = tuple(torch.full_like(t, float("nan")) for t in (inputs.lora_a[1], inputs.lora_b[1]))
    poisoned = replace(inputs, lora_a=(inputs.lora_a[0], poison[0]), lora_b=(inputs.lora_b[0], poison[1]))
    assert equal(decode(poisoned), decode(inputs))
    used = replace(poisoned, gate=inputs.gate.index_fill(0, torch.tensor([2]), 1.0))
    others = [0, 1, 3, 4]
    assert torch.equal(decode(used)["delta"][others], decode(inputs)["delta"][others])
    assert decode(used)["delta"][2].isnan().all()


@DTYPES
def test_the_base_is_added_once_whatever_its_strides(dtype: torch.dtype) -> None:
    inputs = drawn(BY_NAME["sample_gates"], dtype, torch.float32)
    delta = decode(inputs)["delta"]
    base = torch.randn(3, 10, 130, generator=torch.Generator().manual_seed(1)).to(dtype)[:, ::2]
    y = decode(inputs, base)["delta"]
    exact = base.double() + truth(inputs)["delta"]
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2 * float(delta.abs().max())
                               * torch.finfo(dtype).eps)  # fmt: skip
    assert torch.equal(decode(inputs, torch.zeros(3, 5, 130, dtype=dtype))["delta"], delta)


def test_the_working_dtype_is_the_base_s() -> None:
    inputs = drawn(BY_NAME["sample_gates"], torch.float32, torch.float32)
    base = torch.zeros(3, 5, 130, dtype=torch.bfloat16)
    assert equal(decode(inputs, base), decode(replace(inputs, x=inputs.x.bfloat16())))


@pytest.mark.parametrize("name", ["one_row", "forty_experts", "sixteen_rows_top2"])
def test_two_launches_whatever_the_experts_and_none_without_rows(host: Any, name: str) -> None:
    before = host.launches
    decode(drawn(BY_NAME[name], torch.float32, torch.float32))
    assert host.launches - before == 2
    decode(drawn(BY_NAME["zero_rows"], torch.float32, torch.float32))
    assert host.launches - before == 2


def test_an_expert_without_columns_adds_nothing() -> None:
    inputs = drawn(BY_NAME["sample_gates"], torch.float32, torch.float32)
    ranked = {"lora_a": (inputs.lora_a[0], inputs.lora_a[1][:0]), "lora_b": (inputs.lora_b[0], inputs.lora_b[1][:, :0])}
    alone = {"lora_a": inputs.lora_a[:1], "lora_b": inputs.lora_b[:1], "scale": inputs.scale[:1]}
    delta = decode(replace(inputs, **ranked))["delta"]  # type: ignore[arg-type]
    assert torch.equal(delta, decode(replace(inputs, gate=inputs.gate[..., :1], **alone))["delta"])  # type: ignore[arg-type]


def test_experts_of_several_dtypes_and_strided_ones_are_copied_first() -> None:
    inputs = drawn(BY_NAME["sample_gates"], torch.float32, torch.float32)
    mixed = replace(
        inputs,
        lora_a=(inputs.lora_a[0].double(), inputs.lora_a[1].t().contiguous().t()),
        lora_b=(inputs.lora_b[0], inputs.lora_b[1].double()),
    )
    assert equal(decode(mixed), decode(inputs))
    half = replace(inputs, lora_a=tuple(a.half() for a in inputs.lora_a), lora_b=tuple(b.half() for b in inputs.lora_b))
    rounded = replace(half, lora_a=tuple(a.float() for a in half.lora_a), lora_b=tuple(b.float() for b in half.lora_b))
    assert equal(decode(half), decode(rounded))


def test_gates_of_another_dtype_and_strided_ones_are_copied_first() -> None:
    inputs = drawn(BY_NAME["token_gates"], torch.float32, torch.float32)
    narrow = inputs.gate.bfloat16()
    strided = narrow.float().transpose(0, 2).contiguous().transpose(0, 2)
    expected = decode(replace(inputs, gate=narrow.float()))
    assert equal(decode(replace(inputs, gate=narrow)), expected)
    assert equal(decode(replace(inputs, gate=strided)), expected)


def test_rows_beyond_32_bits_are_reached() -> None:
    """A row step of 2^30 elements: row 5 lies past the 32nd bit. The memory between is never touched."""
    step = 2**30
    x = torch.as_strided(torch.empty(5 * step + 16, dtype=torch.float16), (6, 16), (step, 1))
    x.copy_(torch.arange(96).view(6, 16) / 96)
    a, b, gate = torch.eye(16).half(), torch.eye(16).half(), torch.ones(1, 1)
    y, _ = cuda.multi_lora_forward(LoraCall(x, None, [a], [b], gate, [1.0], 0.0, False, None))
    assert torch.equal(y, x.contiguous())


def test_what_is_no_decode_step_is_refused_before_anything_is_launched(host: Any) -> None:
    inputs = drawn(Workload(name="", leading=(17,), in_features=8, out_features=8, ranks=(2,)), torch.float32,
                   torch.float32)  # fmt: skip
    before = host.launches
    with pytest.raises(ValueError) as caught:
        decode(inputs)
    assert str(caught.value) == (
        "backend='cuda' got 17 rows of x; expected at most 16, a decode step. Pass backend='triton' or "
        "backend='reference' for this call."
    )
    with pytest.raises(ValueError) as caught:
        cuda.multi_lora_forward(
            LoraCall(
                inputs.x[:4], None, inputs.lora_a, inputs.lora_b, inputs.gate[:4], [1.0], 0.1, False, torch.tensor(1)
            )
        )
    assert str(caught.value) == (
        "backend='cuda' got dropout=0.1; expected 0, since its kernels are for inference and draw no masks. Put the "
        "layer in eval() or pass backend='triton' or backend='reference'."
    )
    assert host.launches == before


def test_the_launcher_refuses_what_the_glue_would(host: Any) -> None:
    x, gate = torch.zeros(17, 8), torch.ones(1, 1)
    tables = (torch.zeros(6, 2, dtype=torch.int64), torch.tensor([[0, 2]], dtype=torch.int32))
    for rows, gates in ((17, gate), (4, torch.ones(3, 1))):
        with pytest.raises(RuntimeError, match="cudaError_t 1: "):
            host.decode(x[:rows], None, gates, *tables, 8, torch.float32, False, False)
    with pytest.raises(RuntimeError, match="cudaError_t 1: "):
        host.decode(x[:4], None, gate, *tables, 8, torch.bfloat16, False, False)
