# SPDX-License-Identifier: Apache-2.0
"""
    direct    partial[b, i, j] = sum over a tile (i, j) of (G_b^T X_b)^2            the p x d gradient is never written
    ghost     partial[b, i, j] = w sum over a tile of (X_i X_j^T) * (G_i G_j^T),  w = 1, 2, 0 for j =, >, < i
    sketch    partial[k] = (G_k L)^T (X_k R)                                        k: a tile of rows
    add_rows  out = [out +] sum over the rows of partial, in order

Kernels of the gradient norms: one writer per partial, sums in a fixed order, tiles within one sample.
"""

from __future__ import annotations

import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

from dmole_kernels.triton_backend.tiles import load_tile, narrow, product, store_tile, summed_products


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _gradient_tile(  # type: ignore[no-untyped-def]
    x, grad, x_step, grad_step, outputs, features, T, P, D,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(G^T X)[outputs, features] over T rows, zero outside."""
    return summed_products(
        grad, outputs.to(tl.int64), outputs < P, grad_step, x, features.to(tl.int64), features < D, x_step,
        tl.zeros([WIDTH, WIDTH], dtype=ACC), T, ROWS, TYPE, UPCAST,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def norm_direct(  # type: ignore[no-untyped-def]
    x, grad, partial, T, P, D,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.cdiv(D, WIDTH)
    tiles = columns * tl.cdiv(P, WIDTH)
    sample, tile = (program // tiles).to(tl.int64), program % tiles
    outputs = (tile // columns) * WIDTH + tl.arange(0, WIDTH)
    features = (tile % columns) * WIDTH + tl.arange(0, WIDTH)
    total = _gradient_tile(
        x + sample * T * D, grad + sample * T * P, D, P, outputs, features, T, P, D, ROWS, WIDTH, TYPE, ACC, UPCAST
    )
    tl.store(partial + program, tl.sum(tl.sum(total * total, 1), 0))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def accumulate(  # type: ignore[no-untyped-def]
    buffer, x, grad, buffer_step, x_step, grad_step, T, P, D,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """buffer += G^T X."""
    program = tl.program_id(0)
    columns = tl.cdiv(D, WIDTH)
    outputs = (program // columns) * WIDTH + tl.arange(0, WIDTH)
    features = (program % columns) * WIDTH + tl.arange(0, WIDTH)
    total = _gradient_tile(
        x, grad, x_step, grad_step, outputs, features, T, P, D, ROWS, WIDTH, TYPE, ACC, UPCAST
    )  # fmt: skip
    total += load_tile(buffer, outputs, outputs < P, buffer_step, features, features < D).to(ACC)
    store_tile(buffer, outputs, outputs < P, buffer_step, features, features < D, total, UPCAST)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _gram(  # type: ignore[no-untyped-def]
    tokens, left_rows, right_rows, T, WIDE,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    return summed_products(
        tokens, left_rows.to(tl.int64) * WIDE, left_rows < T, 1, tokens, right_rows.to(tl.int64) * WIDE, right_rows < T,
        1, tl.zeros([ROWS, ROWS], dtype=ACC), WIDE, WIDTH, TYPE, UPCAST,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def norm_ghost(  # type: ignore[no-untyped-def]
    x, grad, partial, T, P, D,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    side = tl.cdiv(T, ROWS)
    sample, pair = (program // (side * side)).to(tl.int64), program % (side * side)
    left, right = pair // side, pair % side
    # Tiles below the diagonal equal those above: they are skipped and the others count twice.
    if right >= left:
        left_rows, right_rows = left * ROWS + tl.arange(0, ROWS), right * ROWS + tl.arange(0, ROWS)
        gram_x = _gram(x + sample * T * D, left_rows, right_rows, T, D, ROWS, WIDTH, TYPE, ACC, UPCAST)
        gram_g = _gram(grad + sample * T * P, left_rows, right_rows, T, P, ROWS, WIDTH, TYPE, ACC, UPCAST)
        weight = tl.where(right == left, 1.0, 2.0).to(ACC)
        tl.store(partial + program, tl.sum(tl.sum(gram_x * gram_g, 1), 0) * weight)
    else:
        tl.store(partial + program, tl.zeros([], dtype=ACC))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _projected(  # type: ignore[no-untyped-def]
    tokens, matrix, rows, columns, N, WIDE, K, step,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    return summed_products(
        tokens, rows.to(tl.int64) * step, rows < N, 1, matrix, columns.to(tl.int64), columns < K, K,
        tl.zeros([ROWS, COLUMNS], dtype=ACC), WIDE, WIDTH, TYPE, UPCAST,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def sketch_tile(  # type: ignore[no-untyped-def]
    x, grad, left, right, partial, N, P, D, K, L, x_step, grad_step,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr,
    TYPE: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of rows, and one block of the sketch's sides."""
    program = tl.program_id(0)
    across = tl.cdiv(L, BLOCK_L)
    sketch_blocks = tl.cdiv(K, BLOCK_K) * across
    tile, sketch_block = program // sketch_blocks, program % sketch_blocks
    rows = tile * ROWS + tl.arange(0, ROWS)
    k = (sketch_block // across) * BLOCK_K + tl.arange(0, BLOCK_K)
    l = (sketch_block % across) * BLOCK_L + tl.arange(0, BLOCK_L)  # noqa: E741
    u = _projected(grad, left, rows, k, N, P, K, grad_step, ROWS, WIDTH, BLOCK_K, TYPE, ACC, UPCAST)
    v = _projected(x, right, rows, l, N, D, L, x_step, ROWS, WIDTH, BLOCK_L, TYPE, ACC, UPCAST)
    total = product(tl.trans(u), v, tl.zeros([BLOCK_K, BLOCK_L], dtype=ACC), TYPE, UPCAST)
    store_tile(partial + tile.to(tl.int64) * K * L, k, k < K, L, l, l < L, total, UPCAST)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def add_rows(  # type: ignore[no-untyped-def]
    partial, out, count, columns, ADD: tl.constexpr, SIZE: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr
):
    """out[c] (+)= sum_r partial[r, c] in order of r."""
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = place < columns
    total = tl.zeros([SIZE], dtype=ACC)
    pointers = partial + place
    for _ in range(0, count):
        total += tl.load(pointers, mask=mask, other=0.0)
        pointers += columns
    if ADD:
        total += tl.load(out + place, mask=mask, other=0.0).to(ACC)
    tl.store(out + place, narrow(total, out.dtype.element_ty, UPCAST), mask=mask)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def add_samples(partial, out, count, SIZE: tl.constexpr, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[b] = max(0, sum_i partial[b, i]); cancellation can leave a norm of zero below it."""
    sample = tl.program_id(0).to(tl.int64)
    total = tl.zeros([SIZE], dtype=ACC)
    for first in range(0, count, SIZE):
        place = first + tl.arange(0, SIZE)
        total += tl.load(partial + sample * count + place, mask=place < count, other=0.0)
    value = tl.sum(total, 0)
    tl.store(out + sample, tl.where(value < 0, 0.0, value))
