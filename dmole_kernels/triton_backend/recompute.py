# SPDX-License-Identifier: Apache-2.0
"""
    out[i, p] = sum over the k with C[i, k] != 0 of left[i, k] right[k, p]       where out[i, p] is NaN

The dot of a tile includes (row, expert) pairs whose gate is zero; an inf or NaN in the expert, x or dY then makes the
result NaN. These functions compute the NaN elements again without such pairs, one output row and a few summands at a
time, so that they need few registers and the common path keeps its own. Elements that are not NaN keep their bits,
whichever other rows are in the tile.
"""

from __future__ import annotations

import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

from dmole_kernels.triton_backend.dropout import keep_tile
from dmole_kernels.triton_backend.tiles import column_gate, load_tile, narrow, pointers_into_b, rows_of_a

SUMMED_COLUMNS = tl.constexpr(8)  # or features of x
SUMMED_ROWS = tl.constexpr(32)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _masked_sum(left, used, right, ACC: tl.constexpr, TYPE: tl.constexpr, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """[1, WIDTH]: the sum of left[k, 0] right[k, :] over the k that are used, both rounded as a dot's operands."""
    products = narrow(left, TYPE, UPCAST).to(ACC) * narrow(right, TYPE, UPCAST).to(ACC)
    return tl.sum(tl.where(used, products, tl.zeros_like(products)), 0, keep_dims=True)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _replace_nan(pointers, mask, value, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    before = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(pointers, narrow(value, pointers.dtype.element_ty, UPCAST), mask=mask & (before != before))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def expanded_row(  # type: ignore[no-untyped-def]
    shrunk, table, gate, rows, row_mask, outputs, output_mask, R, E, rows_per_gate,
    WIDTH: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, B_TYPE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """((S * C) B^T)[rows, outputs] for a single row."""
    total = tl.zeros([1, WIDTH], dtype=ACC)
    for first in range(0, R, SUMMED_COLUMNS):
        columns = first + tl.arange(0, SUMMED_COLUMNS)
        column_mask = columns < R
        gate_tile = column_gate(gate, table, rows, row_mask, columns, column_mask, R, E, rows_per_gate, ACC)
        gated = load_tile(shrunk, rows, row_mask, R, columns, column_mask).to(ACC) * gate_tile
        b_tile = tl.load(
            pointers_into_b(table, columns, column_mask, outputs, R, B_TYPE, 1, False),
            mask=column_mask[:, None] & output_mask[None, :],
            other=0.0,
        )
        total += _masked_sum(tl.trans(gated), tl.trans(gate_tile) != 0, b_tile, ACC, TYPE, UPCAST)
    return total


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def recompute_expand(  # type: ignore[no-untyped-def]
    base, shrunk, table, gate, y, begin, outputs, output_mask, N, P, R, E, rows_per_gate, base_step,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, B_TYPE: tl.constexpr,
    HAS_BASE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    tl.debug_barrier()  # the tile is in memory
    for row in range(begin, tl.minimum(begin + ROWS, N)):
        rows = row + tl.arange(0, 1)
        total = expanded_row(
            shrunk, table, gate, rows, rows < N, outputs, output_mask, R, E, rows_per_gate,
            WIDTH, TYPE, ACC, B_TYPE, UPCAST,
        )  # fmt: skip
        if HAS_BASE:
            total += load_tile(base, rows, rows < N, base_step, outputs, output_mask).to(ACC)
        _replace_nan(y + rows.to(tl.int64)[:, None] * P + outputs[None, :], output_mask[None, :], total, UPCAST)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def recompute_fused(  # type: ignore[no-untyped-def]
    x, weight, bias, shrunk, table, gate, y, begin, outputs, output_mask, N, D, P, R, E, rows_per_gate, x_step,
    weight_step,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, B_TYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    tl.debug_barrier()
    for row in range(begin, tl.minimum(begin + ROWS, N)):
        rows = row + tl.arange(0, 1)
        total = expanded_row(
            shrunk, table, gate, rows, rows < N, outputs, output_mask, R, E, rows_per_gate,
            WIDTH, TYPE, ACC, B_TYPE, UPCAST,
        )  # fmt: skip
        for first in range(0, D, SUMMED_COLUMNS):
            features = first + tl.arange(0, SUMMED_COLUMNS)
            x_tile = load_tile(x, rows, rows < N, x_step, features, features < D)
            places = weight + outputs.to(tl.int64)[None, :] * weight_step + features[:, None]
            inside = (features < D)[:, None]
            weight_tile = tl.load(places, mask=inside & output_mask[None, :], other=0.0)
            total += _masked_sum(tl.trans(x_tile), inside, weight_tile, ACC, TYPE, UPCAST)
        if HAS_BIAS:
            total += tl.load(bias + outputs, mask=output_mask, other=0.0).to(ACC)[None, :]
        _replace_nan(y + rows.to(tl.int64)[:, None] * P + outputs[None, :], output_mask[None, :], total, UPCAST)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def recompute_input_gradient(  # type: ignore[no-untyped-def]
    dshrunk, table, gate, dx, begin, first_feature, N, D, R, E, rows_per_gate, key_low, key_high, threshold,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, A_TYPE: tl.constexpr,
    MASKS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """MASKS: each column has the mask of its expert. A shared mask leaves no NaN where it drops."""
    tl.debug_barrier()
    features = first_feature + tl.arange(0, WIDTH)
    feature_mask = features < D
    for row in range(begin, tl.minimum(begin + ROWS, N)):
        rows = row + tl.arange(0, 1)
        total = tl.zeros([1, WIDTH], dtype=ACC)
        for first in range(0, R, SUMMED_COLUMNS):
            columns = first + tl.arange(0, SUMMED_COLUMNS)
            column_mask = columns < R
            gate_tile = column_gate(gate, table, rows, rows < N, columns, column_mask, R, E, rows_per_gate, ACC)
            ds_tile = load_tile(dshrunk, rows, rows < N, R, columns, column_mask)
            a_rows = rows_of_a(table, columns, column_mask, A_TYPE, False)
            mask = column_mask[:, None] & feature_mask[None, :]
            a_tile = tl.load(a_rows[:, None] + features[None, :], mask=mask, other=0.0)
            used = tl.trans(gate_tile) != 0
            if MASKS:
                expert = tl.load(table + 3 * R + columns, mask=column_mask, other=0).to(tl.int32)
                same = row + tl.zeros([SUMMED_COLUMNS], dtype=tl.int32)
                used &= keep_tile(same, first_feature, expert[:, None], key_low, key_high, threshold, SUMMED_COLUMNS)
            total += _masked_sum(tl.trans(ds_tile), used, a_tile, ACC, TYPE, UPCAST)
        _replace_nan(dx + rows.to(tl.int64)[:, None] * D + features[None, :], feature_mask[None, :], total, UPCAST)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def recompute_weight_gradient(  # type: ignore[no-untyped-def]
    left, right, out, table, gate, first_column, count, first, stream, begin, stop, WIDE, R, E, rows_per_gate, step,
    key_low, key_high, threshold,
    WIDTH: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows begin to stop of left^T right, for `count` columns; `out` begins at the split's first row."""
    tl.debug_barrier()
    features = first + tl.arange(0, WIDTH)
    feature_mask = features < WIDE
    for column in range(first_column, first_column + count):
        columns = column + tl.arange(0, 1)
        gradient_row = tl.load(table + 5 * R + columns)
        total = tl.zeros([1, WIDTH], dtype=ACC)
        for start in range(begin, stop, SUMMED_ROWS):
            rows = start + tl.arange(0, SUMMED_ROWS)
            row_mask = rows < stop
            gate_tile = column_gate(gate, table, rows, row_mask, columns, columns < R, R, E, rows_per_gate, ACC)
            left_tile = load_tile(left, rows, row_mask, R, columns, columns < R)
            if GATED:
                left_tile = left_tile.to(ACC) * gate_tile
            right_tile = load_tile(right, rows, row_mask, step, features, feature_mask)
            if DROPOUT:
                keep = keep_tile(rows, first, stream, key_low, key_high, threshold, SUMMED_ROWS)
                right_tile = tl.where(keep, right_tile, tl.zeros_like(right_tile))
            total += _masked_sum(left_tile, gate_tile != 0, right_tile, ACC, TYPE, UPCAST)
        places = out + gradient_row[:, None] * WIDE + features[None, :]
        _replace_nan(places, (gradient_row >= 0)[:, None] & feature_mask[None, :], total, UPCAST)
