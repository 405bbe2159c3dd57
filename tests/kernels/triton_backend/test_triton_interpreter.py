# SPDX-License-Identifier: Apache-2.0
"""The interpreter's own bugs that the kernels step around: when both tests fail, UPCAST can go."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def bfloat16_dot(left, right, out):  # type: ignore[no-untyped-def]
    places = tl.arange(0, 16)
    tile = places[:, None] * 16 + places[None, :]
    tl.store(out + tile, tl.dot(tl.load(left + tile), tl.load(right + tile)))


@triton.jit
def bfloat16_cast(wide, out):  # type: ignore[no-untyped-def]
    places = tl.arange(0, 16)
    tl.store(out + places, tl.load(wide + places).to(tl.bfloat16))


def test_canary_the_interpreter_still_cuts_bits_off_in_casts_to_bfloat16() -> None:
    wide, out = torch.linspace(1.0, 2.0, 16), torch.empty(16, dtype=torch.bfloat16)
    bfloat16_cast[(1,)](wide, out)
    assert not torch.equal(out, wide.bfloat16()), "the bug is gone: remove the rounding from tiles.narrow"


def test_canary_the_interpreter_still_multiplies_bit_patterns_of_bfloat16() -> None:
    left, right = torch.full((16, 16), 1.5).bfloat16(), torch.eye(16).bfloat16()
    out = torch.empty(16, 16)
    bfloat16_dot[(1,)](left, right, out)
    assert not torch.equal(out, left.float()), "the bug is gone: remove UPCAST from the kernels"
