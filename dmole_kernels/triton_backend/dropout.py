# SPDX-License-Identifier: Apache-2.0
"""
    keep[n, d] = (word, or word with its halves swapped where (d // 16) % 2) >= threshold       word: see `philox.py`

The mask of `philox.dropout_keep_mask`, bit for bit, for a tile of rows by 128 columns: one Philox call gives four words
and each word two decisions, so 128 columns need 16 calls.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from dmole_kernels.triton_backend.launch import signed


def mask_arguments(dropout: float, seed: Tensor | None, device: torch.device) -> dict[str, Any]:
    """The seed, the threshold as int32 and the factor 1 / (1 - dropout); without a seed none is used.

    A seed on the device is passed as its address and read by the kernels (DEVICE_KEY): no host synchronisation,
    and a captured CUDA graph uses the value of the tensor at each replay. A seed on the host is passed as two int32
    words, so a graph would repeat its masks.
    """
    if seed is not None and seed.device == device:
        key: dict[str, Any] = {"key_low": seed, "key_high": 0}
    else:
        number = 0 if seed is None else int(seed)
        key = {"key_low": signed(number & 0xFFFFFFFF), "key_high": signed((number >> 32) & 0xFFFFFFFF)}
    return key | {
        "DROPOUT": seed is not None,
        "DEVICE_KEY": isinstance(key["key_low"], Tensor),
        "threshold": 0 if seed is None else signed(round(dropout * 2**32)),
        "inverse_keep": 1.0 if seed is None else 1.0 / (1.0 - dropout),
    }


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def key_words(seed):  # type: ignore[no-untyped-def]
    """(key_low, key_high) of the int64 at this address."""
    key = tl.load(seed)
    return key.to(tl.int32), (key >> 32).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _two_decisions(word, limit):  # type: ignore[no-untyped-def]
    swapped = (word << 16) | (word >> 16)
    return tl.join((word >= limit).to(tl.int8), (swapped >= limit).to(tl.int8))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def keep_tile(rows, first_column, stream, key_low, key_high, threshold, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Booleans [ROWS, 128] for columns first_column (a multiple of 128) and on."""
    zero = tl.zeros([ROWS, 16], dtype=tl.int32)
    counter_0 = (zero + ((first_column // 128) * 16 + tl.arange(0, 16))[None, :]).to(tl.uint32)
    counter_1 = (zero + rows[:, None]).to(tl.uint32)
    counter_2 = (zero + stream).to(tl.uint32)
    word_0, word_1, word_2, word_3 = tl.philox_impl(
        counter_0, counter_1, counter_2, zero.to(tl.uint32), key_low.to(tl.uint32), key_high.to(tl.uint32), 10
    )
    limit = threshold.to(tl.uint32)
    # [rows, lane, half, word % 2, word // 2] -> [rows, 32 word + 16 half + lane].
    low = tl.join(_two_decisions(word_0, limit), _two_decisions(word_1, limit))
    high = tl.join(_two_decisions(word_2, limit), _two_decisions(word_3, limit))
    return tl.reshape(tl.permute(tl.join(low, high), (0, 4, 3, 2, 1)), (ROWS, 128)) != 0
