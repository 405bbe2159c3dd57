# SPDX-License-Identifier: Apache-2.0
"""
    y = base + (S * C) B^T                 forward, kernel `expand`
    dx = keep * (dS A)                     backward, kernel `input_gradient`

One program: a tile of rows by a tile of features, the sum over the column blocks that any of its rows needs, in order.
Where the sum has a NaN, `recompute` computes it again without the (row, expert) pairs whose gate is zero.
"""

from __future__ import annotations

import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

from dmole_kernels.triton_backend.dropout import keep_tile, key_words
from dmole_kernels.triton_backend.recompute import recompute_expand, recompute_input_gradient
from dmole_kernels.triton_backend.tiles import (
    any_nan,
    block_columns,
    column_gate,
    is_active,
    load_tile,
    pointers_into_b,
    product,
    rows_of_a,
    store_tile,
)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _expanded_block(  # type: ignore[no-untyped-def]
    total, shrunk, table, blocks, gate, rows, row_mask, outputs, output_mask, block, R, E, rows_per_gate,
    BLOCK_R: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, B_TYPE: tl.constexpr, B_RUN: tl.constexpr,
    PER_EXPERT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    columns, column_mask, _ = block_columns(blocks, block, R, BLOCK_R, PER_EXPERT)
    gate_tile = column_gate(gate, table, rows, row_mask, columns, column_mask, R, E, rows_per_gate, ACC)
    gated = load_tile(shrunk, rows, row_mask, R, columns, column_mask).to(ACC) * gate_tile
    gated = tl.where(gate_tile == 0, tl.zeros_like(gated), gated)
    b_tile = tl.load(
        pointers_into_b(table, columns, column_mask, outputs, R, B_TYPE, B_RUN, False),
        mask=column_mask[:, None] & output_mask[None, :],
        other=0.0,
    )
    return product(gated, b_tile, total, TYPE, UPCAST)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def expanded_blocks(  # type: ignore[no-untyped-def]
    total, shrunk, table, blocks, gate, flags, tile, rows, row_mask, outputs, output_mask, R, E, rows_per_gate,
    block_count, flag_rows,
    BLOCK_R: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, B_TYPE: tl.constexpr, B_RUN: tl.constexpr,
    PER_EXPERT: tl.constexpr, ONE_BLOCK: tl.constexpr, RATIO: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """total + (S * C) B^T over the column blocks that a row of the tile needs, in order."""
    stop = 1 if ONE_BLOCK else block_count
    for block in range(0, stop):
        if is_active(flags, tile, block, flag_rows, block_count, RATIO, ONE_BLOCK):
            total = _expanded_block(
                total, shrunk, table, blocks, gate, rows, row_mask, outputs, output_mask, block, R, E,
                rows_per_gate, BLOCK_R, TYPE, ACC, B_TYPE, B_RUN, PER_EXPERT, UPCAST,
            )  # fmt: skip
    return total


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def expand(  # type: ignore[no-untyped-def]
    base, shrunk, table, blocks, gate, flags, y, N, P, R, E, rows_per_gate, block_count, flag_rows, base_step,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr,
    B_TYPE: tl.constexpr, B_RUN: tl.constexpr, PER_EXPERT: tl.constexpr, HAS_BASE: tl.constexpr,
    ONE_BLOCK: tl.constexpr, RATIO: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tiles = tl.cdiv(P, WIDTH)
    tile = program // tiles
    rows = tile * ROWS + tl.arange(0, ROWS)
    outputs = (program % tiles) * WIDTH + tl.arange(0, WIDTH)
    row_mask, output_mask = rows < N, outputs < P
    total = tl.zeros([ROWS, WIDTH], dtype=ACC)
    total = expanded_blocks(
        total, shrunk, table, blocks, gate, flags, tile, rows, row_mask, outputs, output_mask, R, E, rows_per_gate,
        block_count, flag_rows, BLOCK_R, TYPE, ACC, B_TYPE, B_RUN, PER_EXPERT, ONE_BLOCK, RATIO, UPCAST,
    )  # fmt: skip
    bad = any_nan(total)
    if HAS_BASE:
        total += load_tile(base, rows, row_mask, base_step, outputs, output_mask).to(ACC)
    store_tile(y, rows, row_mask, P, outputs, output_mask, total, UPCAST)
    if bad:
        recompute_expand(
            base, shrunk, table, gate, y, tile * ROWS, outputs, output_mask, N, P, R, E, rows_per_gate, base_step,
            ROWS, WIDTH, TYPE, ACC, B_TYPE, HAS_BASE, UPCAST,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _input_block(  # type: ignore[no-untyped-def]
    total, dshrunk, table, blocks, rows, row_mask, features, feature_mask, block, R, key_low, key_high, threshold,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr,
    A_TYPE: tl.constexpr, A_ALIGNED: tl.constexpr, MASKS: tl.constexpr, PER_EXPERT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    columns, column_mask, stream = block_columns(blocks, block, R, BLOCK_R, PER_EXPERT)
    ds_tile = load_tile(dshrunk, rows, row_mask, R, columns, column_mask)
    a_rows = rows_of_a(table, columns, column_mask, A_TYPE, A_ALIGNED)
    a_tile = tl.load(a_rows[:, None] + features[None, :], mask=column_mask[:, None] & feature_mask[None, :], other=0.0)
    if MASKS:
        keep = keep_tile(rows, tl.min(features, 0), stream, key_low, key_high, threshold, ROWS)
        partial = product(ds_tile, a_tile, tl.zeros([ROWS, WIDTH], dtype=ACC), TYPE, UPCAST)
        total += tl.where(keep, partial, tl.zeros_like(partial))
    else:
        total = product(ds_tile, a_tile, total, TYPE, UPCAST)
    return total


@triton.jit(do_not_specialize=["key_low", "key_high", "threshold"])  # type: ignore[untyped-decorator, unused-ignore]
def input_gradient(  # type: ignore[no-untyped-def]
    dshrunk, table, blocks, gate, flags, dx, N, D, R, E, rows_per_gate, block_count, flag_rows,
    key_low, key_high, threshold,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr,
    A_TYPE: tl.constexpr, A_ALIGNED: tl.constexpr, DROPOUT: tl.constexpr, DEVICE_KEY: tl.constexpr,
    PER_EXPERT: tl.constexpr, ONE_BLOCK: tl.constexpr, RATIO: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tiles = tl.cdiv(D, WIDTH)
    tile = program // tiles
    rows = tile * ROWS + tl.arange(0, ROWS)
    features = (program % tiles) * WIDTH + tl.arange(0, WIDTH)
    row_mask, feature_mask = rows < N, features < D
    total = tl.zeros([ROWS, WIDTH], dtype=ACC)
    if DEVICE_KEY:
        key_low, key_high = key_words(key_low)
    stop = 1 if ONE_BLOCK else block_count
    for block in range(0, stop):
        if is_active(flags, tile, block, flag_rows, block_count, RATIO, ONE_BLOCK):
            total = _input_block(
                total, dshrunk, table, blocks, rows, row_mask, features, feature_mask, block, R, key_low, key_high,
                threshold, ROWS, WIDTH, BLOCK_R, TYPE, ACC, A_TYPE, A_ALIGNED, DROPOUT and PER_EXPERT, PER_EXPERT,
                UPCAST,
            )  # fmt: skip
    bad = any_nan(total)
    first = (program % tiles) * WIDTH
    if DROPOUT and not PER_EXPERT:
        keep = keep_tile(rows, first, 0, key_low, key_high, threshold, ROWS)
        total = tl.where(keep, total, tl.zeros_like(total))
    store_tile(dx, rows, row_mask, D, features, feature_mask, total, UPCAST)
    if bad:
        recompute_input_gradient(
            dshrunk, table, gate, dx, tile * ROWS, first, N, D, R, E, rows_per_gate, key_low, key_high, threshold,
            ROWS, WIDTH, TYPE, ACC, A_TYPE, DROPOUT and PER_EXPERT, UPCAST,
        )  # fmt: skip
