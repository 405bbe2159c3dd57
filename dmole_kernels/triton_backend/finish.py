# SPDX-License-Identifier: Apache-2.0
"""
    dA = sum_k partial_a[k]      dB^T = sum_k partial_b[k]      dg[g, e] = s[e] sum_{n of g} sum_{j in e} (P * S)[n, j]

The last sums of backward in one launch, each in a fixed order: over the splits of `weight_gradient`, and over a gate's
rows counted from the gate's own first row, so that a sample's dg does not depend on its position in the batch.
"""

from __future__ import annotations

import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

from dmole_kernels.triton_backend.tiles import narrow


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _sum_splits(partial, out, program, count, splits, SIZE: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    place = program.to(tl.int64) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros([SIZE], dtype=ACC)
    for split in range(0, splits):
        total += tl.load(partial + split * count + place, mask=place < count, other=0.0)
    tl.store(out + place, narrow(total, out.dtype.element_ty, UPCAST), mask=place < count)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _gate_gradient(  # type: ignore[no-untyped-def]
    products, table, experts, dgate, program, G, R, E, rows_per_gate,
    ROWS: tl.constexpr, TOKEN_GATES: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Token gates: ROWS gates of one expert; else one gate of one expert, ROWS of its rows at a time."""
    expert = program % E
    first = tl.load(experts + 2 * expert)
    rank = tl.load(experts + 2 * expert + 1)
    # An expert of rank 0 has no column with its scale; its gradient is zero.
    scale = tl.load(table + 4 * R + first, mask=rank > 0, other=0).to(tl.float64, bitcast=True).to(ACC)
    total = tl.zeros([ROWS, 16], dtype=ACC)
    offsets = tl.arange(0, ROWS)
    if TOKEN_GATES:
        rows = (program // E) * ROWS + offsets
        for start in range(0, rank, 16):
            columns = start + tl.arange(0, 16)
            place = products + rows.to(tl.int64)[:, None] * R + (first + columns)[None, :]
            total += tl.load(place, mask=(rows < G)[:, None] & (columns < rank)[None, :], other=0.0)
        value = tl.sum(total, 1) * scale
        tl.store(dgate + rows.to(tl.int64) * E + expert, narrow(value, dgate.dtype.element_ty, UPCAST), mask=rows < G)
    else:
        gate_row = (program // E).to(tl.int64)
        for begin in range(0, rows_per_gate, ROWS):
            rows = begin + offsets
            for start in range(0, rank, 16):
                columns = start + tl.arange(0, 16)
                place = products + (gate_row * rows_per_gate + rows)[:, None] * R + (first + columns)[None, :]
                mask = (rows < rows_per_gate)[:, None] & (columns < rank)[None, :]
                total += tl.load(place, mask=mask, other=0.0)
        value = tl.sum(tl.sum(total, 1), 0) * scale
        tl.store(dgate + gate_row * E + expert, narrow(value, dgate.dtype.element_ty, UPCAST))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def finish(  # type: ignore[no-untyped-def]
    partial_a, partial_b, da, db, products, table, experts, dgate,
    count_a, count_b, splits, G, R, E, rows_per_gate,
    SIZE: tl.constexpr, ROWS: tl.constexpr, WEIGHTS: tl.constexpr, NEED_GATE: tl.constexpr, TOKEN_GATES: tl.constexpr,
    ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    before = 0
    if WEIGHTS:
        programs_a, programs_b = tl.cdiv(count_a, SIZE), tl.cdiv(count_b, SIZE)
        before = programs_a + programs_b
        if program < programs_a:
            _sum_splits(partial_a, da, program, count_a, splits, SIZE, ACC, UPCAST)
        elif program < before:
            _sum_splits(partial_b, db, program - programs_a, count_b, splits, SIZE, ACC, UPCAST)
    if NEED_GATE:
        if program >= before:
            _gate_gradient(products, table, experts, dgate, program - before, G, R, E, rows_per_gate, ROWS,
                           TOKEN_GATES, ACC, UPCAST)  # fmt: skip
