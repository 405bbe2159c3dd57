# SPDX-License-Identifier: Apache-2.0
"""The row map made by the kernels of the device, number for number the one of the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dmole_kernels import RowMap, cpu, cuda

pytestmark = pytest.mark.usefixtures("host")
UNWRITTEN = -1
FIRST, LAST = 1, 2


def row_map_table(gate_GE: Tensor, rows: int) -> list[int]:
    """{rows, experts, pairs}, start, row, flags (csrc/cpu/row_map.h), in plain Python."""
    gates, experts = gate_GE.shape
    span = rows // gates if gates else 0
    opened = [[e for e in range(experts) if gate_GE[n // span, e] != 0] for n in range(rows)]
    rows_of = [[n for n in range(rows) if e in opened[n]] for e in range(experts)]
    start = [sum(map(len, rows_of[:e])) for e in range(experts + 1)]
    flags = [
        FIRST * (e == opened[n][0]) | LAST * (e == opened[n][-1]) for e, members in enumerate(rows_of) for n in members
    ]
    return [rows, experts, start[-1], *start, *(n for members in rows_of for n in members), *flags]


def needed_words(gate_GE: Tensor, rows: int) -> list[list[int]]:
    gates, experts = gate_GE.shape
    tiles = []
    for begin in range(0, rows, 32):
        tile = range(begin, min(begin + 32, rows))
        used = [e for e in range(experts) if any(gate_GE[n // (rows // gates), e] != 0 for n in tile)]
        words = [sum(1 << (e % 32) for e in used if e // 32 == w) for w in range(-(-experts // 32))]
        tiles.append([word - 2**32 if word >= 2**31 else word for word in words])
    return tiles


def check(gate_GE: Tensor, rows: int) -> list[int]:
    table, needed = cuda.row_map(gate_GE, rows)
    expected = row_map_table(gate_GE, rows)
    assert table[: len(expected)].tolist() == expected
    assert (table[len(expected) :] == UNWRITTEN).all()
    assert needed.tolist() == needed_words(gate_GE, rows)
    if cpu.EXTENSION is not None:
        assert RowMap(gate_GE, rows).table.tolist() == expected
    return expected


def drawn_gate(gates: int, experts: int, share: float = 0.3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(gates, experts, generator=generator) < share
    return torch.where(chosen, torch.randn(gates, experts, generator=generator), 0.0)


def test_the_example_of_the_header() -> None:
    assert check(torch.tensor([[1.0, 0.0], [1.0, -1.0]]), 4) == [4, 2, 6, 0, 4, 6, 0, 1, 2, 3, 2, 3, 3, 3, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("gates", "rows", "experts"),
    [(0, 0, 3), (1, 0, 3), (1, 1, 1), (1, 31, 2), (32, 32, 5), (3, 33, 33), (129, 129, 4), (4, 1036, 7), (65, 65, 70)],
)
def test_the_table_is_the_cpu_s(gates: int, rows: int, experts: int) -> None:
    check(drawn_gate(gates, experts), rows)


def test_more_tiles_than_a_warp_scans_at_once() -> None:
    check(drawn_gate(1100, 3), 1100)


@pytest.mark.parametrize("pattern", ["no_expert", "all_experts", "one_expert", "last_unused"])
def test_gates_of_one_kind(pattern: str) -> None:
    gate = torch.zeros(45, 6) if pattern in ("no_expert", "one_expert") else torch.ones(45, 6)
    gate[:, {"one_expert": 3, "last_unused": 5}.get(pattern, 0)] = {"no_expert": 0.0, "last_unused": 0.0}.get(
        pattern, 2.0
    )
    check(gate, 45)
    check(gate, 90)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    gates=st.integers(1, 40),
    span=st.integers(1, 5),
    experts=st.integers(1, 40),
    share=st.sampled_from((0.02, 0.3, 1.0)),
)
def test_any_gate(gates: int, span: int, experts: int, share: float) -> None:
    check(drawn_gate(gates, experts, share, seed=gates), gates * span)


def test_the_order_of_threads_and_blocks_changes_no_number(host: Any) -> None:
    gate = drawn_gate(300, 37)
    for kind, seed in (("forward", 0), ("reverse", 0), ("shuffled", 1), ("shuffled", 2)):
        with host.order(kind, seed):
            check(gate, 300)


def test_three_launches_and_one_without_rows(host: Any) -> None:
    before = host.launches
    cuda.row_map(drawn_gate(40, 3), 40)
    assert host.launches - before == 3
    cuda.row_map(drawn_gate(0, 3), 0)
    assert host.launches - before == 4


def test_the_launcher_refuses_what_the_glue_would(host: Any) -> None:
    for gate, rows in ((torch.ones(3, 2), 4), (torch.ones(0, 2), 4), (torch.ones(4, 0), 4)):
        with pytest.raises(RuntimeError, match="cudaError_t 1: "):
            host.row_map(gate, rows)
