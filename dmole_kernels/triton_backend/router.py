# SPDX-License-Identifier: Apache-2.0
"""
    error[n, t] = mean_d (f(Wd[t] relu(We[t] z[n] + be[t]) + bd[t])_d - z[n, d])^2          f = sigmoid or identity
    pooled[b, d], token[b, d] = max and the first argmax over t with mask[b, t] of hidden[b, t, d]

The router's kernels: one program a tile of samples and a task, the hidden values never written; one program a sample
and a tile of features.
"""

from __future__ import annotations

import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

from dmole_kernels.triton_backend.tiles import load_tile, narrow, product, summed_products


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def router_score(  # type: ignore[no-untyped-def]
    features, encoder_weight, encoder_bias, decoder_weight, decoder_bias, error, N, T, D, H, step,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_H: tl.constexpr, SIGMOID: tl.constexpr,
    TYPE: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    rows = (program // T) * ROWS + tl.arange(0, ROWS)
    task = (program % T).to(tl.int64)
    hidden = tl.arange(0, BLOCK_H)
    row_mask, hidden_mask = rows < N, hidden < H
    encoded = summed_products(
        features, rows.to(tl.int64) * step, row_mask, 1, encoder_weight, (task * H + hidden) * D, hidden_mask, 1,
        tl.zeros([ROWS, BLOCK_H], dtype=ACC), D, WIDTH, TYPE, UPCAST,
    )  # fmt: skip
    bias = tl.load(encoder_bias + task * H + hidden, mask=hidden_mask, other=0.0)
    encoded = encoded + bias.to(ACC)[None, :]
    encoded = tl.where(encoded < 0, 0.0, encoded)

    total = tl.zeros([ROWS], dtype=ACC)
    for first in range(0, D, WIDTH):
        places = first + tl.arange(0, WIDTH)
        inside = places < D
        weight = tl.load(
            decoder_weight + (task * D + places)[None, :] * H + hidden[:, None],
            mask=hidden_mask[:, None] & inside[None, :],
            other=0.0,
        )
        decoded = product(encoded, weight, tl.zeros([ROWS, WIDTH], dtype=ACC), TYPE, UPCAST)
        decoded += tl.load(decoder_bias + task * D + places, mask=inside, other=0.0).to(ACC)[None, :]
        if SIGMOID:
            decoded = 1.0 / (1.0 + tl.exp(-decoded))
        z_tile = load_tile(features, rows, row_mask, step, places, inside)
        difference = tl.where(inside[None, :], decoded - z_tile.to(ACC), 0.0)
        total += tl.sum(difference * difference, 1)
    place = error + rows.to(tl.int64) * T + task
    tl.store(place, narrow(total / D, TYPE, UPCAST), mask=row_mask)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def masked_max_pool(  # type: ignore[no-untyped-def]
    hidden, mask, values, tokens, T, D, WIDTH: tl.constexpr, ACC: tl.constexpr
):
    """The first of equal maxima; a NaN is larger than anything, as in PyTorch."""
    program = tl.program_id(0)
    tiles = tl.cdiv(D, WIDTH)
    sample = (program // tiles).to(tl.int64)
    places = (program % tiles) * WIDTH + tl.arange(0, WIDTH)
    inside = places < D
    best = tl.full([WIDTH], float("-inf"), dtype=ACC)
    best_token = tl.zeros([WIDTH], dtype=tl.int64)
    for token in range(0, T):
        seen = tl.load(mask + sample * T + token) != 0
        value = tl.load(hidden + (sample * T + token) * D + places, mask=inside, other=0.0).to(ACC)
        value = tl.where(seen, value, float("-inf"))
        better = ((value > best) | (value != value)) & (best == best)
        best = tl.where(better, value, best)
        best_token = tl.where(better, token, best_token)
    tl.store(values + sample * D + places, best.to(values.dtype.element_ty), mask=inside)
    tl.store(tokens + sample * D + places, best_token, mask=inside)
