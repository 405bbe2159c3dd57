# SPDX-License-Identifier: Apache-2.0
"""
    y = x W^T + bias + (S * C) B^T         one launch after `shrink`: the base product with its sum extended by R

An experiment, off by default (`MultiLoRALinear(fuse_base=True)`), until a GPU run shows its base product within
10 % of PyTorch's: it saves writing and reading y once (2 N p), which a slower product would cost again. For
N = d = p = 4096, R = 64 in 16 bits: base + 36 MB instead of base + 103.
"""

from __future__ import annotations

import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from dmole_kernels._lora_call import LoraCall
from dmole_kernels.triton_backend.columns import rows_of
from dmole_kernels.triton_backend.configs import Target, configuration
from dmole_kernels.triton_backend.expand import expanded_blocks
from dmole_kernels.triton_backend.launch import Launch, Runner, run, size, target_of
from dmole_kernels.triton_backend.multi_lora import metadata_and_flag_bytes, row_tile, shrink_rows
from dmole_kernels.triton_backend.recompute import recompute_fused
from dmole_kernels.triton_backend.tiles import any_nan, store_tile, summed_products

NEIGHBOURS = 8  # row tiles that use one tile of W one after another, so that both stay in the cache


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def fused_base(  # type: ignore[no-untyped-def]
    x, weight, bias, shrunk, table, blocks, gate, flags, y, N, D, P, R, E, rows_per_gate, block_count, flag_rows,
    x_step, weight_step,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, BLOCK_R: tl.constexpr, TYPE: tl.constexpr,
    ACC: tl.constexpr, B_TYPE: tl.constexpr, B_RUN: tl.constexpr, PER_EXPERT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ONE_BLOCK: tl.constexpr, RATIO: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row_tiles, tiles = tl.cdiv(N, ROWS), tl.cdiv(P, WIDTH)
    first_tile = program // (GROUP * tiles) * GROUP
    together = tl.minimum(GROUP, row_tiles - first_tile)
    place = program % (GROUP * tiles)
    tile = first_tile + place % together
    rows = tile * ROWS + tl.arange(0, ROWS)
    outputs = place // together * WIDTH + tl.arange(0, WIDTH)
    row_mask, output_mask = rows < N, outputs < P
    total = summed_products(
        x, rows.to(tl.int64) * x_step, row_mask, 1, weight, outputs.to(tl.int64) * weight_step, output_mask, 1,
        tl.zeros([ROWS, WIDTH], dtype=ACC), D, DEPTH, TYPE, UPCAST,
    )  # fmt: skip
    total = expanded_blocks(
        total, shrunk, table, blocks, gate, flags, tile, rows, row_mask, outputs, output_mask, R, E, rows_per_gate,
        block_count, flag_rows, BLOCK_R, TYPE, ACC, B_TYPE, B_RUN, PER_EXPERT, ONE_BLOCK, RATIO, UPCAST,
    )  # fmt: skip
    bad = any_nan(total)
    if HAS_BIAS:
        total += tl.load(bias + outputs, mask=output_mask, other=0.0).to(ACC)[None, :]
    store_tile(y, rows, row_mask, P, outputs, output_mask, total, UPCAST)
    if bad:
        recompute_fused(
            x, weight, bias, shrunk, table, gate, y, tile * ROWS, outputs, output_mask, N, D, P, R, E, rows_per_gate,
            x_step, weight_step, ROWS, WIDTH, TYPE, ACC, B_TYPE, HAS_BIAS, UPCAST,
        )  # fmt: skip


def fused_base_forward(
    call: LoraCall, weight_PD: Tensor, bias_P: Tensor | None, *, target: Target | None = None, runner: Runner = run
) -> tuple[Tensor, Tensor]:
    """y and S in x's dtype, to which W and the bias are rounded in the kernel; otherwise as `multi_lora_forward`."""
    x = call.x
    assert x is not None
    target = target_of(x.device) if target is None else target
    columns, arguments = shrink_rows(call, x.dtype, target, runner)
    s_NR, outputs = arguments["shrunk"], arguments["P"]
    y = x.new_empty((*x.shape[:-1], outputs))
    if y.numel() == 0:
        return y, s_NR
    weight_PD = rows_of(weight_PD)
    config = configuration("fused_base", target, x.dtype.itemsize * 8)
    runner(
        Launch.bound(
            fused_base,
            arguments
            | row_tile(config, arguments)
            | {
                "DEPTH": config.depth,
                "GROUP": NEIGHBOURS,
                "HAS_BIAS": bias_P is not None,
                "weight": weight_PD,
                "bias": y if bias_P is None else bias_P.contiguous(),
                "y": y,
                "weight_step": weight_PD.stride(0),
            },
            grid=-(-s_NR.shape[0] // config.rows) * -(-outputs // config.width),
            config=config,
            dots=[(config.rows, config.width, config.depth), (config.rows, config.width, columns.block)],
            reads={
                "x": size(arguments["x"]),
                "W": size(weight_PD),
                "bias": size(bias_P),
                "S": size(s_NR),
                "B": columns.bytes_b,
                "metadata": metadata_and_flag_bytes(arguments),
            },
            writes={"y": size(y)},
        )
    )
    return y, s_NR
