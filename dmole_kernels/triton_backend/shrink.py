# SPDX-License-Identifier: Apache-2.0
"""
    S = x^ A^T / (1-q)                     forward, kernel `shrink`
    P = dY B,  dS = P * C / (1-q)          backward, kernel `shrink_gradient`; also P * S where dg is wanted

One program: a tile of rows by a block of packed columns, the sum over all features in order: no split, one writer.
Both write to `flags` whether each (row tile, column block) pair has a gate that is not zero. Later launches skip the
other pairs, and so does the loop here with FLAG_MODE "skip", since their result is not read. The flags need no launch
of their own, no host synchronisation and no cache.
"""

from __future__ import annotations

import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

from dmole_kernels.triton_backend.dropout import keep_tile, key_words
from dmole_kernels.triton_backend.tiles import (
    block_columns,
    column_gate,
    load_tile,
    pointers_into_b,
    product,
    rows_of_a,
    store_tile,
)


@triton.jit(do_not_specialize=["key_low", "key_high", "threshold"])  # type: ignore[untyped-decorator, unused-ignore]
def shrink(  # type: ignore[no-untyped-def]
    x, table, blocks, gate, shrunk, flags, N, D, R, E, rows_per_gate, block_count, x_step,
    key_low, key_high, threshold, inverse_keep,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr,
    A_TYPE: tl.constexpr, A_ALIGNED: tl.constexpr, DROPOUT: tl.constexpr, DEVICE_KEY: tl.constexpr,
    PER_EXPERT: tl.constexpr, FLAG_MODE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # Column blocks of one row tile are neighbouring programs, so that all but the first find x in the cache.
    program = tl.program_id(0)
    tile, block = program // block_count, program % block_count
    rows = tile * ROWS + tl.arange(0, ROWS)
    row_mask = rows < N
    columns, column_mask, stream = block_columns(blocks, block, R, BLOCK_R, PER_EXPERT)
    stop = D
    if FLAG_MODE != "none":
        gate_tile = column_gate(gate, table, rows, row_mask, columns, column_mask, R, E, rows_per_gate, ACC)
        active = tl.max(tl.max((gate_tile != 0).to(tl.int32), 1), 0)
        tl.store(flags + tile * block_count + block, active)
        if FLAG_MODE == "skip":
            stop = D * active

    a_rows = rows_of_a(table, columns, column_mask, A_TYPE, A_ALIGNED)
    if DEVICE_KEY:
        key_low, key_high = key_words(key_low)
    total = tl.zeros([ROWS, BLOCK_R], dtype=ACC)
    for first in range(0, stop, WIDTH):
        features = first + tl.arange(0, WIDTH)
        inside = features < D
        x_tile = load_tile(x, rows, row_mask, x_step, features, inside)
        if DROPOUT:
            keep = keep_tile(rows, first, stream, key_low, key_high, threshold, ROWS)
            x_tile = tl.where(keep, x_tile, tl.zeros_like(x_tile))
        a_tile = tl.load(a_rows[None, :] + features[:, None], mask=inside[:, None] & column_mask[None, :], other=0.0)
        total = product(x_tile, a_tile, total, TYPE, UPCAST)
    if DROPOUT:
        total = total * inverse_keep
    store_tile(shrunk, rows, row_mask, R, columns, column_mask, total, UPCAST)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def shrink_gradient(  # type: ignore[no-untyped-def]
    grad, table, blocks, gate, shrunk, dshrunk, products, flags, N, P, R, E, rows_per_gate, block_count, grad_step,
    inverse_keep,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr,
    B_TYPE: tl.constexpr, B_RUN: tl.constexpr, PER_EXPERT: tl.constexpr, NEED_GATE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile, block = program // block_count, program % block_count
    rows = tile * ROWS + tl.arange(0, ROWS)
    row_mask = rows < N
    columns, column_mask, _ = block_columns(blocks, block, R, BLOCK_R, PER_EXPERT)
    gate_tile = column_gate(gate, table, rows, row_mask, columns, column_mask, R, E, rows_per_gate, ACC)
    active = tl.max(tl.max((gate_tile != 0).to(tl.int32), 1), 0)
    tl.store(flags + tile * block_count + block, active)
    # A gate of zero still has a gradient, so P is needed in full for it.
    stop = P if NEED_GATE else P * active

    total = tl.zeros([ROWS, BLOCK_R], dtype=ACC)
    for first in range(0, stop, WIDTH):
        outputs = first + tl.arange(0, WIDTH)
        inside = outputs < P
        grad_tile = load_tile(grad, rows, row_mask, grad_step, outputs, inside)
        b_tile = tl.load(
            pointers_into_b(table, columns, column_mask, outputs, R, B_TYPE, B_RUN, True),
            mask=inside[:, None] & column_mask[None, :],
            other=0.0,
        )
        total = product(grad_tile, b_tile, total, TYPE, UPCAST)
    if NEED_GATE:
        s_tile = load_tile(shrunk, rows, row_mask, R, columns, column_mask).to(ACC)
        store_tile(products, rows, row_mask, R, columns, column_mask, total * s_tile, UPCAST)
    # Not multiplied where the gate is zero: P may be inf or NaN there.
    ds_tile = tl.where(gate_tile == 0, tl.zeros_like(total), total * gate_tile * inverse_keep)
    store_tile(dshrunk, rows, row_mask, R, columns, column_mask, ds_tile, UPCAST)
