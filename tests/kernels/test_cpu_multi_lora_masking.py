# SPDX-License-Identifier: Apache-2.0
"""A gate of zero means zero in the compiled multi-LoRA kernels, whatever the row or the expert holds, and gates are
multiplied in their own dtype. Truth is a loop over rows and experts in float64 that leaves unused pairs out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from dmole_kernels import cpu
from dmole_kernels._lora_call import LoraCall, Wanted
from dmole_kernels.testing import Results, poisoned_memory

pytestmark = pytest.mark.skipif(cpu.EXTENSION is None, reason=f"no compiled extension: {cpu.MISSING}")

INFINITY, NAN = float("inf"), float("nan")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def poisoned_scratch() -> Iterator[None]:
    with poisoned_memory():
        yield


@dataclass(frozen=True, kw_only=True)
class Call:
    x: Tensor
    lora_a: list[Tensor]
    lora_b: list[Tensor]
    gate: Tensor
    scale: list[float]
    grad: Tensor
    dropout: float = 0.0
    per_expert: bool = False

    @property
    def row_gate(self) -> Tensor:
        return self.gate.repeat_interleave(self.x.shape[0] // self.gate.shape[0], 0)


def drawn(
    dtype: torch.dtype, *, rows: int = 62, gates: int = 62, features: int = 70, outputs: int = 45,
    ranks: tuple[int, ...] = (3, 16, 5), seed: int = 0,
) -> Call:  # fmt: skip
    """Neighbouring rows use different experts, some rows none: every tile of rows has both."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    used = torch.rand(gates, len(ranks), generator=generator) < 0.5
    used[0] = torch.tensor([True] + [False] * (len(ranks) - 1))
    return Call(
        x=draw(rows, features),
        lora_a=[draw(rank, features) / 8 for rank in ranks],
        lora_b=[draw(outputs, rank) for rank in ranks],
        gate=(torch.rand(gates, len(ranks), generator=generator) + 0.5) * used,
        scale=[2.0, 0.75, -0.5, 1.25][: len(ranks)],
        grad=draw(rows, outputs),
    )


def run(call: Call, *, every_column: bool = True, need_gate: bool = True, table: Tensor | None = None) -> Results:
    """`every_column` as a gate that requires grad has it."""
    seed = torch.tensor(2025) if call.dropout else None
    arguments = (call.lora_a, call.lora_b, call.gate, call.scale, call.dropout, call.per_expert, seed)
    trainable = [True] * len(call.scale)
    delta, s_NR = cpu.multi_lora_forward(LoraCall(call.x, None, *arguments, every_column, table))
    backward = cpu.multi_lora_backward(
        LoraCall(call.x, None, *arguments, row_map=table), call.grad, s_NR, Wanted(True, need_gate, trainable)
    )
    dx, da_RD, db_RP, dgate = backward
    ranks = [a.shape[0] for a in call.lora_a]
    results = {"delta": delta, "dx": dx} | ({"dgate": dgate} if need_gate else {})
    for e, (da, db) in enumerate(zip(da_RD.split(ranks), db_RP.split(ranks), strict=True)):
        results |= {f"da_{e}": da, f"db_{e}": db.t()}
    return results


def truth(call: Call) -> Results:
    x, grad, row_gate = call.x.double(), call.grad.double(), call.row_gate.double()
    lora_a, lora_b = [a.double() for a in call.lora_a], [b.double() for b in call.lora_b]
    results = {"delta": torch.zeros_like(grad), "dx": torch.zeros_like(x), "dgate": call.gate.double() * 0}
    span = call.x.shape[0] // call.gate.shape[0]
    for e, (a, b, scale) in enumerate(zip(lora_a, lora_b, call.scale, strict=True)):
        da, db = torch.zeros_like(a), torch.zeros_like(b)
        for n in range(x.shape[0]):
            s, p = a @ x[n], grad[n] @ b
            results["dgate"][n // span, e] += scale * (s * p).sum()
            factor = row_gate[n, e] * scale
            if row_gate[n, e] != 0:
                results["delta"][n] += factor * (b @ s)
                results["dx"][n] += factor * (p @ a)
                da += factor * torch.outer(p, x[n])
                db += factor * torch.outer(grad[n], s)
        results |= {f"da_{e}": da, f"db_{e}": db}
    return results


def check_near(actual: Results, exact: Results, dtype: torch.dtype) -> None:
    """Finite where the truth is, and then within a few roundings of the largest value."""
    assert actual.keys() <= exact.keys()
    for name, values in actual.items():
        expected = exact[name]
        finite = expected.isfinite()
        assert torch.equal(values.isfinite(), finite), name
        size = float(expected[finite].abs().max()) if bool(finite.any()) else 0.0
        error = (values.double() - expected)[finite].abs()
        assert not error.numel() or float(error.max()) <= 16 * torch.finfo(dtype).eps * size, name


def without_expert(results: Results, expert: int) -> Results:
    return {name: values for name, values in results.items() if not name.endswith(f"_{expert}")}


@DTYPES
@pytest.mark.parametrize("gates", [62, 31, 2], ids=lambda gates: f"{gates}_gates")
def test_every_output_equals_the_loop(level: str, dtype: torch.dtype, gates: int) -> None:
    call = drawn(dtype, gates=gates)
    exact = truth(call)
    check_near(run(call), exact, dtype)
    check_near(run(call, every_column=False, need_gate=False), exact, dtype)


@DTYPES
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("per_expert", [False, True], ids=["shared", "per_expert"])
@pytest.mark.parametrize("value", [INFINITY, NAN])
@pytest.mark.parametrize("where", ["a", "b", "both"])
def test_an_expert_of_inf_or_nan_changes_no_bit_where_it_is_not_used(
    level: str, dtype: torch.dtype, where: str, value: float, per_expert: bool, dropout: float
) -> None:
    call = replace(drawn(dtype), dropout=dropout, per_expert=per_expert)
    lora_a, lora_b = list(call.lora_a), list(call.lora_b)
    if where in ("a", "both"):
        lora_a[1] = torch.full_like(lora_a[1], value)
    if where in ("b", "both"):
        lora_b[1] = torch.full_like(lora_b[1], value)
    clean, actual = run(call), run(replace(call, lora_a=lora_a, lora_b=lora_b))
    unused = call.row_gate[:, 1] == 0
    assert 0 < int(unused.sum()) < len(unused)
    for name in ("delta", "dx"):
        assert torch.equal(actual[name][unused], clean[name][unused]), name
    for name in ("da_0", "db_0", "da_2", "db_2"):
        assert torch.equal(actual[name], clean[name]), name
    assert torch.equal(actual["dgate"][:, [0, 2]], clean["dgate"][:, [0, 2]])
    assert not actual["delta"][~unused].isfinite().all(1).any()
    # Without the gate's gradient too.
    constant = run(replace(call, lora_a=lora_a, lora_b=lora_b), every_column=False, need_gate=False)
    for name in constant:
        torch.testing.assert_close(constant[name], actual[name], rtol=0, atol=0, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("value", [INFINITY, NAN])
@pytest.mark.parametrize("where", ["x", "grad"])
def test_a_row_of_inf_or_nan_reaches_no_gradient_of_an_expert_that_it_does_not_use(
    level: str, dtype: torch.dtype, where: str, value: float
) -> None:
    call = drawn(dtype)
    rows = (call.gate[:, 1] == 0).nonzero().flatten()[::2]
    poisoned = getattr(call, where).clone()
    poisoned[rows] = value
    changed = replace(call, **{where: poisoned})
    clean, actual, exact = run(call), run(changed), truth(changed)
    for name in ("da_1", "db_1"):
        assert torch.equal(actual[name], clean[name]), name
        check_near({name: actual[name]}, exact, dtype)
    others = torch.ones(call.x.shape[0], dtype=torch.bool)
    others[rows] = False
    for name in ("delta", "dx", "dgate"):
        assert torch.equal(actual[name][others], clean[name][others]), name
    without_expert = (call.gate[rows] == 0).all(1)
    assert bool(without_expert.any())
    assert not actual["delta"][rows[without_expert]].any()
    assert not actual["dx"][rows[without_expert]].any()


@DTYPES
def test_one_table_of_rows_serves_constant_and_trained_gates(level: str, dtype: torch.dtype) -> None:
    call = drawn(dtype)
    table = cpu.RowMap(call.gate, call.x.shape[0]).table
    for every_column in (False, True):
        expected = run(call, every_column=every_column, need_gate=every_column)
        actual = run(call, every_column=every_column, need_gate=every_column, table=table)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_the_gradient_of_a_gate_at_zero_is_whole(level: str, zero: float) -> None:
    call = drawn(torch.float32)
    call = replace(call, gate=torch.full_like(call.gate, zero))
    actual, exact = run(call), truth(call)
    check_near(actual, exact, torch.float32)
    assert bool(actual["dgate"].all())
    assert not any(values.any() for name, values in actual.items() if name != "dgate")


@DTYPES
def test_a_scale_of_zero_is_an_ordinary_number(level: str, dtype: torch.dtype) -> None:
    call = drawn(dtype)
    call = replace(call, scale=[2.0, 0.0, -0.5])
    actual = run(call)
    check_near(actual, truth(call), dtype)
    assert not actual["da_1"].any() and not actual["dgate"][:, 1].any()
    broken = run(replace(call, lora_b=[call.lora_b[0], torch.full_like(call.lora_b[1], INFINITY), call.lora_b[2]]))
    assert bool(broken["delta"][call.gate[:, 1] != 0].isnan().all())


@DTYPES
@pytest.mark.parametrize("gate_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_gate_and_scale_are_multiplied_in_the_gate_s_dtype_or_float32(
    level: str, dtype: torch.dtype, gate_dtype: torch.dtype
) -> None:
    """A scale that no narrow dtype holds: 1e5 is beyond float16, and 1.0009765625 is 1 in bfloat16."""
    call = drawn(dtype)
    # A gate that bfloat16 rounds only after it is multiplied.
    call = replace(call, gate=(call.gate != 0).to(gate_dtype) * 0.8125, scale=[1e5, 1.0009765625, -3e4])
    actual, exact = run(call), truth(call)
    assert actual["dgate"].dtype == gate_dtype
    narrow = actual.pop("dgate").double()
    check_near(actual, exact, dtype)
    limit = torch.finfo(gate_dtype).max
    fits = exact["dgate"].abs() < limit
    error = (narrow - exact["dgate"])[fits].abs().max()
    eps = max(torch.finfo(gate_dtype).eps, torch.finfo(dtype).eps)
    assert float(error) <= 16 * eps * float(exact["dgate"][fits].abs().max())
    # Each expert against its own size: the small one does not hide behind the large ones.
    only = replace(call, gate=call.gate * torch.tensor([0, 1, 0], dtype=gate_dtype))
    check_near({"delta": run(only)["delta"]}, truth(only), dtype)


def test_a_float64_gate_that_float32_rounds_to_zero_is_used(level: str) -> None:
    """Its factor is not zero, and it is not a gate of zero."""
    call = drawn(torch.float32, rows=4, gates=4, ranks=(3,))
    call = replace(call, gate=torch.full((4, 1), 1e-60, dtype=torch.float64), scale=[1e60])
    check_near(run(call, need_gate=False), truth(call), torch.float32)


@DTYPES
@pytest.mark.parametrize("ranks", [(0, 0, 3), (0,), (0, 0), (5, 0, 2), (3, 0)], ids=str)
def test_experts_of_rank_0_add_nothing_and_have_empty_gradients(
    level: str, dtype: torch.dtype, ranks: tuple[int, ...]
) -> None:
    call = drawn(dtype, ranks=ranks)
    call = replace(call, gate=call.gate.index_fill(0, torch.tensor([5, 6]), 1.5))
    for every_column in (False, True):
        actual = run(call, every_column=every_column, need_gate=every_column)
        check_near(actual, truth(call), dtype)
        for e, rank in enumerate(ranks):
            assert actual[f"da_{e}"].shape == (rank, 70)
            assert actual[f"db_{e}"].shape == (45, rank)
