# SPDX-License-Identifier: Apache-2.0
"""
    dA = dS^T x^        dB^T = (S * C)^T dY            both in one launch; rows of trainable columns only

One program: a column block by a tile of features, summed over its split of the row tiles in order. With more than one
split the sums are float32 partials that `finish` adds in the order of the splits. Row tiles whose rows do not use the
column block are skipped. Where a sum has a NaN, `recompute` computes it again without the (row, expert) pairs whose
gate is zero.
"""

from __future__ import annotations

import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

from dmole_kernels.triton_backend.dropout import keep_tile, key_words
from dmole_kernels.triton_backend.recompute import recompute_weight_gradient
from dmole_kernels.triton_backend.tiles import (
    any_nan,
    block_columns,
    column_gate,
    is_active,
    load_tile,
    narrow,
    product,
)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _row_tile(  # type: ignore[no-untyped-def]
    total, left, right, table, gate, tile, columns, column_mask, first, stream, N, WIDE, R, E, rows_per_gate, step,
    key_low, key_high, threshold,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, GATED: tl.constexpr,
    DROPOUT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """total + left^T right for one row tile; left gated (S for dB) or as it is (dS for dA, where right is x)."""
    rows = tile * ROWS + tl.arange(0, ROWS)
    features = first + tl.arange(0, WIDTH)
    row_mask, feature_mask = rows < N, features < WIDE
    left_tile = load_tile(left, rows, row_mask, R, columns, column_mask)
    if GATED:
        gate_tile = column_gate(gate, table, rows, row_mask, columns, column_mask, R, E, rows_per_gate, ACC)
        left_tile = left_tile.to(ACC) * gate_tile
        left_tile = tl.where(gate_tile == 0, tl.zeros_like(left_tile), left_tile)
    right_tile = load_tile(right, rows, row_mask, step, features, feature_mask)
    if DROPOUT:
        keep = keep_tile(rows, first, stream, key_low, key_high, threshold, ROWS)
        right_tile = tl.where(keep, right_tile, tl.zeros_like(right_tile))
    return product(tl.trans(left_tile), right_tile, total, TYPE, UPCAST)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _split_sum(  # type: ignore[no-untyped-def]
    left, right, out, table, blocks, gate, flags, block, tile, split, splits, N, WIDE, R, E, rows_per_gate,
    block_count, flag_rows, step, row_count, key_low, key_high, threshold,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr,
    PER_EXPERT: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr, ONE_BLOCK: tl.constexpr,
    RATIO: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program's sum, written to out [splits, row_count, WIDE]."""
    columns, column_mask, stream = block_columns(blocks, block, R, BLOCK_R, PER_EXPERT)
    row_tiles = tl.cdiv(N, ROWS)
    each = tl.cdiv(row_tiles, splits)
    begin = split * each
    first = tile * WIDTH
    total = tl.zeros([BLOCK_R, WIDTH], dtype=ACC)
    for row_tile in range(begin, tl.minimum(begin + each, row_tiles)):
        if is_active(flags, row_tile, block, flag_rows, block_count, RATIO, ONE_BLOCK):
            total = _row_tile(
                total, left, right, table, gate, row_tile, columns, column_mask, first, stream, N, WIDE, R, E,
                rows_per_gate, step, key_low, key_high, threshold, ROWS, WIDTH, TYPE, ACC, GATED, DROPOUT, UPCAST,
            )  # fmt: skip
    gradient_row = tl.load(table + 5 * R + columns, mask=column_mask, other=-1)
    features = first + tl.arange(0, WIDTH)
    out += split.to(tl.int64) * row_count * WIDE
    place = out + gradient_row[:, None] * WIDE + features[None, :]
    mask = (gradient_row >= 0)[:, None] & (features < WIDE)[None, :]
    tl.store(place, narrow(total, out.dtype.element_ty, UPCAST), mask=mask)
    if any_nan(total):
        recompute_weight_gradient(
            left, right, out, table, gate, tl.min(columns, 0), tl.sum(column_mask.to(tl.int32), 0), first, stream,
            begin * ROWS, tl.minimum((begin + each) * ROWS, N), WIDE, R, E, rows_per_gate, step,
            key_low, key_high, threshold, WIDTH, TYPE, ACC, GATED, DROPOUT, UPCAST,
        )  # fmt: skip


@triton.jit(do_not_specialize=["key_low", "key_high", "threshold"])  # type: ignore[untyped-decorator, unused-ignore]
def weight_gradient(  # type: ignore[no-untyped-def]
    x, grad, shrunk, dshrunk, table, blocks, trainable_blocks, gate, flags, partial_a, partial_b,
    N, D, P, R, E, rows_per_gate, block_count, trainable_block_count, flag_rows, x_step, grad_step, row_count, splits,
    key_low, key_high, threshold,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr,
    DROPOUT: tl.constexpr, DEVICE_KEY: tl.constexpr, PER_EXPERT: tl.constexpr, ONE_BLOCK: tl.constexpr,
    RATIO: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    if DEVICE_KEY:
        key_low, key_high = key_words(key_low)
    program = tl.program_id(0)
    # Column blocks of one tile of features are neighbouring programs: they read the same x or dY.
    block = tl.load(trainable_blocks + program % trainable_block_count)
    tile = program // trainable_block_count
    a_tiles = tl.cdiv(D, WIDTH)
    tiles = a_tiles + tl.cdiv(P, WIDTH)
    split = tile // tiles
    tile = tile % tiles
    if tile < a_tiles:
        _split_sum(
            dshrunk, x, partial_a, table, blocks, gate, flags, block, tile, split, splits, N, D, R, E, rows_per_gate,
            block_count, flag_rows, x_step, row_count, key_low, key_high, threshold,
            ROWS, WIDTH, BLOCK_R, TYPE, ACC, PER_EXPERT, False, DROPOUT, ONE_BLOCK, RATIO, UPCAST,
        )  # fmt: skip
    else:
        _split_sum(
            shrunk, grad, partial_b, table, blocks, gate, flags, block, tile - a_tiles, split, splits, N, P, R, E,
            rows_per_gate, block_count, flag_rows, grad_step, row_count, key_low, key_high, threshold,
            ROWS, WIDTH, BLOCK_R, TYPE, ACC, PER_EXPERT, True, False, ONE_BLOCK, RATIO, UPCAST,
        )  # fmt: skip
