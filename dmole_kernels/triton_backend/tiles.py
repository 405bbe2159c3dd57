# SPDX-License-Identifier: Apache-2.0
"""
Functions shared by the kernels: masked tiles, the dot and the loop around it, gates of a tile, pointers to experts.

A tile mixes rows that use an expert with rows that do not and have a factor of zero; in a dot, zero times an inf or NaN
is NaN. Each kernel therefore checks its sum and, where that has a NaN (rare), computes the NaN elements again
(`recompute`).
"""

from __future__ import annotations

import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def narrow(value, TYPE: tl.constexpr, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """value.to(TYPE), rounded to nearest in the interpreter too, which truncates casts to bfloat16."""
    if UPCAST:
        if TYPE == tl.bfloat16:
            bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            value = bits.to(tl.float32, bitcast=True)
    return value.to(TYPE)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def product(left, right, total, TYPE: tl.constexpr, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """total + left right, both rounded to TYPE, summed in total's dtype."""
    left = narrow(left, TYPE, UPCAST)
    right = narrow(right, TYPE, UPCAST)
    if UPCAST:
        # The interpreter multiplies the bit patterns of bfloat16.
        if TYPE == tl.bfloat16:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def any_nan(tile):  # type: ignore[no-untyped-def]
    return tl.max(tl.max((tile != tile).to(tl.int32), 1), 0) != 0


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def load_tile(pointer, rows, row_mask, step, columns, column_mask):  # type: ignore[no-untyped-def]
    """tile[n, c] = pointer[rows[n] step + columns[c]], zero outside the masks."""
    return tl.load(
        pointer + rows.to(tl.int64)[:, None] * step + columns[None, :],
        mask=row_mask[:, None] & column_mask[None, :],
        other=0.0,
    )


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def store_tile(  # type: ignore[no-untyped-def]
    pointer, rows, row_mask, step, columns, column_mask, tile, UPCAST: tl.constexpr
):
    """The counterpart of `load_tile`, rounded to the pointer's dtype."""
    tl.store(
        pointer + rows.to(tl.int64)[:, None] * step + columns[None, :],
        narrow(tile, pointer.dtype.element_ty, UPCAST),
        mask=row_mask[:, None] & column_mask[None, :],
    )


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def summed_products(  # type: ignore[no-untyped-def]
    left, left_places, left_mask, left_step, right, right_places, right_mask, right_step, total, K,
    DEPTH: tl.constexpr, TYPE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """total[i, j] + sum_k left[left_places[i] + k left_step] right[right_places[j] + k right_step], DEPTH k at a time.

    Places are int64, since multiples of a step can exceed 32 bits; pass a step of 1 as the literal, so that the
    compiler knows it.
    """
    for first in range(0, K, DEPTH):
        k = first + tl.arange(0, DEPTH)
        inside = k < K
        left_tile = tl.load(
            left + left_places[:, None] + (k.to(tl.int64) * left_step)[None, :],
            mask=left_mask[:, None] & inside[None, :],
            other=0.0,
        )
        right_tile = tl.load(
            right + right_places[None, :] + (k.to(tl.int64) * right_step)[:, None],
            mask=inside[:, None] & right_mask[None, :],
            other=0.0,
        )
        total = product(left_tile, right_tile, total, TYPE, UPCAST)
    return total


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def column_gate(  # type: ignore[no-untyped-def]
    gate, table, rows, row_mask, columns, column_mask, R, E, rows_per_gate, ACC: tl.constexpr
):
    """C[n, j] = gate[n, e(j)] s[e(j)], zero outside the masks."""
    expert = tl.load(table + 3 * R + columns, mask=column_mask, other=0)
    scale = tl.load(table + 4 * R + columns, mask=column_mask, other=0).to(tl.float64, bitcast=True).to(ACC)
    gate_row = (rows // rows_per_gate).to(tl.int64)
    both = row_mask[:, None] & column_mask[None, :]
    value = tl.load(gate + gate_row[:, None] * E + expert[None, :], mask=both, other=0.0)
    return value.to(ACC) * scale[None, :]


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def block_columns(blocks, block, R, BLOCK_R: tl.constexpr, PER_EXPERT: tl.constexpr):  # type: ignore[no-untyped-def]
    """(columns, mask, stream of the mask) of a column block."""
    offsets = tl.arange(0, BLOCK_R)
    if PER_EXPERT:
        first = tl.load(blocks + 4 * block)
        count = tl.load(blocks + 4 * block + 1)
        stream = tl.load(blocks + 4 * block + 2)
        columns = first + offsets
        mask = offsets < count
    else:
        # Computed, not loaded, so that the compiler knows that blocks begin at multiples of BLOCK_R.
        stream = block * 0
        columns = block * BLOCK_R + offsets
        mask = columns < R
    return columns, mask, stream


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def rows_of_a(table, columns, column_mask, A_TYPE: tl.constexpr, A_ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pointers to the columns' rows of A."""
    pointers = tl.load(table + columns, mask=column_mask, other=0).to(tl.pointer_type(A_TYPE))
    if A_ALIGNED:
        pointers = tl.multiple_of(pointers, 16)
    return pointers


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def pointers_into_b(  # type: ignore[no-untyped-def]
    table, columns, column_mask, outputs, R, B_TYPE: tl.constexpr, B_RUN: tl.constexpr, OUTPUTS_FIRST: tl.constexpr
):
    """Pointers to B[outputs, columns], as [outputs, columns] or transposed; B_RUN columns are contiguous."""
    start = tl.load(table + R + columns, mask=column_mask, other=0).to(tl.pointer_type(B_TYPE))
    step = tl.load(table + 2 * R + columns, mask=column_mask, other=0)
    if OUTPUTS_FIRST:
        pointers = start[None, :] + outputs.to(tl.int64)[:, None] * step[None, :]
        if B_RUN > 1:
            pointers = tl.max_contiguous(
                tl.multiple_of(pointers, (1, B_RUN * B_TYPE.primitive_bitwidth // 8)), (1, B_RUN)
            )
    else:
        pointers = start[:, None] + outputs.to(tl.int64)[None, :] * step[:, None]
        if B_RUN > 1:
            pointers = tl.max_contiguous(
                tl.multiple_of(pointers, (B_RUN * B_TYPE.primitive_bitwidth // 8, 1)), (B_RUN, 1)
            )
    return pointers


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def is_active(flags, tile, block, flag_rows, blocks, RATIO: tl.constexpr, ONE_BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether any of the RATIO flagged row groups of this tile needs the column block; True with a single block."""
    if ONE_BLOCK:
        active = tl.full([], 1, dtype=tl.int32)
    else:
        group = tile * RATIO + tl.arange(0, RATIO)
        active = tl.max(tl.load(flags + group * blocks + block, mask=group < flag_rows, other=0), 0)
    return active != 0
