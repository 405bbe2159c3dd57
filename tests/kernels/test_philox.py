# SPDX-License-Identifier: Apache-2.0
"""The generator against Random123's published answers, the fast grid against the plain one, the mask's statistics."""

from __future__ import annotations

import math

import pytest
import torch

from dmole_kernels import dropout_keep_mask
from dmole_kernels._philox import COUNTERS_AT_ONCE, LOW, philox_4x32

# kat_vectors of Random123 1.14, philox4x32 with 10 rounds: counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((LOW, LOW, LOW, LOW), (LOW, LOW), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zeros", "ones", "pi"])
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    words = philox_4x32(tuple(torch.tensor([word]) for word in counter), key)  # type: ignore[arg-type]
    assert tuple(int(word) for word in words) == expected


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (5, 128), (77, 130), (3, 1000), (2 * COUNTERS_AT_ONCE // 16 + 1, 7)]
)
def test_the_mask_is_its_formula(rows: int, columns: int) -> None:
    seed, stream, probability = 2**62 + 12345, 3, 0.3
    keep = dropout_keep_mask(seed, rows, columns, probability, stream=stream)
    n = torch.arange(rows)[:, None]
    d = torch.arange(columns)[None, :]
    zero = torch.zeros_like(n * d)
    counter = (16 * (d // 128) + d % 16 + zero, n + zero, stream + zero, zero)
    words = torch.stack(philox_4x32(counter, (seed & LOW, seed >> 32)))
    word = words.gather(0, ((d // 32) % 4 + zero)[None])[0]
    swapped = (word >> 16) | ((word & 0xFFFF) << 16)
    word = torch.where((d // 16) % 2 == 1, swapped, word)
    assert torch.equal(keep, word >= round(probability * 2**32))


def test_rows_do_not_depend_on_how_many_there_are() -> None:
    assert torch.equal(dropout_keep_mask(9, 50, 70, 0.5)[:20], dropout_keep_mask(9, 20, 70, 0.5))
    assert torch.equal(dropout_keep_mask(9, 50, 700, 0.5)[:, :70], dropout_keep_mask(9, 50, 70, 0.5))


def test_seeds_and_streams_differ() -> None:
    masks = [
        dropout_keep_mask(seed, 64, 64, 0.5, stream=stream) for seed, stream in ((1, 0), (2, 0), (1, 1), (2**40 + 1, 0))
    ]
    for i, one in enumerate(masks):
        for other in masks[i + 1 :]:
            assert 0.45 < float((one == other).float().mean()) < 0.55


@pytest.mark.parametrize("probability", [0.0, 0.05, 0.5, 0.999])
def test_share_of_zeros_and_independence_of_columns(probability: float) -> None:
    rows = 20000
    dropped = ~dropout_keep_mask(4, rows, 128, probability)
    deviation = math.sqrt(probability * (1 - probability) / dropped.numel())
    assert float(dropped.double().mean()) == pytest.approx(probability, abs=5 * deviation)
    # Columns d and d + 16 share a word (swapped halves): they must be as independent as strangers.
    both = (dropped[:, :16] & dropped[:, 16:32]).double().mean()
    spread = math.sqrt(probability**2 * (1 - probability**2) / (rows * 16))
    assert float(both) == pytest.approx(probability**2, abs=5 * spread)


def test_no_rows_and_no_columns() -> None:
    assert dropout_keep_mask(1, 0, 5, 0.5).shape == (0, 5)
    assert dropout_keep_mask(1, 5, 0, 0.5).shape == (5, 0)


def test_errors_tell_what_to_do() -> None:
    for arguments in ((1, 2, 3, 1.5), (1, 2, 3, float("nan")), (1, -2, 3, 0.5), (1, 2, -3, 0.5)):
        with pytest.raises(
            ValueError, match=r"probability is .* rows and .* columns; expected a chance in \[0, 1\] and"
        ):
            dropout_keep_mask(*arguments)
