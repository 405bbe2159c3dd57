# SPDX-License-Identifier: Apache-2.0
"""
    word = philox4x32_10(counter=(16 (d // 128) + d % 16, n, stream, 0), key=seed)[(d // 32) % 4]
    keep[n, d] = (word, or word with its halves swapped where (d // 16) % 2) >= round(q 2^32)

The dropout mask as a pure function of (seed, stream, row n, column d): nothing is stored between forward and backward,
and any backend that evaluates the same formula gets the same bits. One word decides two elements: they compare
different halves first and depend on each other only in ties, so their joint probability is off by at most 2^-16, for
nearly half the cost.
16 consecutive columns read one word of 16 consecutive counters: an AVX-512 register needs no transposition.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Random123's constants).

Shape letters: N rows, D columns, G groups of 128 columns, W 4 words, H 2 halves, L 16 lanes, C = 16 G counters a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
LOW = 0xFFFFFFFF
GROUP, LANES = 128, 16

# Counters evaluated at once: large enough to hide PyTorch's cost per call, small enough that the four work buffers of
# 384 KiB stay near the second-level cache.
COUNTERS_AT_ONCE = 24576


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four words of 32 random bits (in int64) for every counter, as published; the counters' words broadcast."""
    word_0, word_1, word_2, word_3 = counter
    for key_0, key_1 in _round_keys(key):
        # A 32 x 32 bit product fits 64 bits, sign bit included; `& LOW` drops the bits that >> sign-extends.
        product_0, product_1 = word_0 * MULTIPLIER_0, word_2 * MULTIPLIER_1
        word_0, word_1 = ((product_1 >> 32) ^ word_1 ^ key_0) & LOW, product_1 & LOW
        word_2, word_3 = ((product_0 >> 32) ^ word_3 ^ key_1) & LOW, product_0 & LOW
    return word_0, word_1, word_2, word_3


def _round_keys(key: tuple[int, int]) -> list[tuple[int, int]]:
    return [((key[0] + i * WEYL_0) & LOW, (key[1] + i * WEYL_1) & LOW) for i in range(ROUNDS)]


def dropout_keep_mask(
    seed: int, rows: int, columns: int, probability: float, *, stream: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Boolean [rows, columns], True where the element is kept (with probability 1 - `probability`, to 2^-32).

    `stream` separates masks drawn from one seed: the expert's position when every expert has its own mask, else 0.
    The seed's lower 64 bits are the key. Equals `philox_4x32` on this grid of counters, word by word, in less time.

    Raises:
        ValueError: for a probability outside [0, 1] or a negative size.
    """
    if not 0.0 <= probability <= 1.0 or rows < 0 or columns < 0:
        raise ValueError(
            f"probability is {probability} for {rows} rows and {columns} columns; expected a chance in [0, 1] and no "
            f"negative size. Use 0.05 for five percent."
        )
    groups = -(-columns // GROUP)
    lanes = groups * LANES
    threshold = round(probability * 2**32)
    keys = _round_keys((seed & LOW, (seed >> 32) & LOW))
    # Row 0 of each pair has the word that MULTIPLIER_0 multiplies next.
    key_R211 = torch.tensor([key[::-1] for key in keys], dtype=torch.int64, device=device)[:, :, None, None]
    multiplier_211 = torch.tensor([MULTIPLIER_0, MULTIPLIER_1], dtype=torch.int64, device=device)[:, None, None]
    keep_NGWHL = torch.empty(rows, groups, 4, 2, LANES, dtype=torch.uint8, device=device)
    step = max(1, min(rows, COUNTERS_AT_ONCE // max(1, lanes)))
    buffers = [torch.empty(2, step, lanes, dtype=torch.int64, device=device) for _ in range(4)]
    for start in range(0, rows, step):
        count = min(step, rows - start)
        factor, mixed, product, previous = (buffer[:, :count] for buffer in buffers)
        _two_rounds(factor, previous, start, stream, keys)
        for key_211 in key_R211[2:]:
            torch.mul(factor, multiplier_211, out=product)
            # Both halves of a pair mix a product with the product of the round before in the same row; the result
            # belongs to the other row. The upper halves of `previous` stay dirty, masked with the rest.
            torch.bitwise_right_shift(product, 32, out=mixed)
            mixed.bitwise_xor_(previous).bitwise_xor_(key_211)
            torch.bitwise_and(mixed[1], LOW, out=factor[0])
            torch.bitwise_and(mixed[0], LOW, out=factor[1])
            product, previous = previous, product
        previous.bitwise_and_(LOW)
        part_NGWHL = keep_NGWHL[start : start + count]
        _compare(factor, (0, 2), threshold, part_NGWHL, mixed)
        _compare(previous, (3, 1), threshold, part_NGWHL, mixed)
    return keep_NGWHL.view(torch.bool).view(rows, groups * GROUP)[:, :columns]


def _compare(bits: Tensor, words: tuple[int, int], threshold: int, keep_NGWHL: Tensor, swapped: Tensor) -> None:
    """Writes both decisions of each word; overwrites bits and the work buffer `swapped`."""
    count, groups, _, _, lanes = keep_NGWHL.shape
    # w * (2^32 + 1) is w twice in a row: its middle 32 bits are w with the halves swapped.
    torch.mul(bits, 2**32 + 1, out=swapped)
    swapped.bitwise_right_shift_(16).bitwise_and_(LOW)
    for half, decision in enumerate((bits, swapped)):
        # In place in int64, then narrowed: half the time of a comparison that stores booleans.
        decision.ge_(threshold)
        for row, word in enumerate(words):
            keep_NGWHL[:, :, word, half].copy_(decision[row].view(count, groups, lanes))


def _two_rounds(factor: Tensor, previous: Tensor, start: int, stream: int, keys: list[tuple[int, int]]) -> None:
    """The first two rounds into (factor, previous): words depend on the row or the column alone, so nearly free."""
    _, count, lanes = factor.shape
    word_0 = torch.arange(lanes, dtype=torch.int64, device=factor.device)[None, :]
    word_1 = torch.arange(start, start + count, dtype=torch.int64, device=factor.device)[:, None]
    word_2 = torch.full_like(word_0[:, :1], stream)
    word_3 = torch.zeros_like(word_2)
    for key_0, key_1 in keys[:2]:
        product_0, product_1 = word_0 * MULTIPLIER_0, word_2 * MULTIPLIER_1
        word_0, word_1 = ((product_1 >> 32) ^ word_1 ^ key_0) & LOW, product_1
        word_2, word_3 = ((product_0 >> 32) ^ word_3 ^ key_1) & LOW, product_0
    factor[0], factor[1] = word_0, word_2
    previous[0], previous[1] = word_3, word_1
