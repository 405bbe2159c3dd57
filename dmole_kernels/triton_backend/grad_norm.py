# SPDX-License-Identifier: Apache-2.0
"""
The gradient norms of `reference` as Triton launches: two for a norm or a sketch, one for an accumulated gradient.

Tensors are read in their own dtype. The norms multiply in float32 (Gram tiles in bfloat16 cost 1.1e-3 of a norm), the
accumulators in the buffer's dtype, as the reference does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmole_kernels.triton_backend.columns import rows_of
from dmole_kernels.triton_backend.configs import Config, Target, configuration
from dmole_kernels.triton_backend.launch import Launch, Runner, computing, run, size, target_of
from dmole_kernels.triton_backend.norms import accumulate, add_rows, add_samples, norm_direct, norm_ghost, sketch_tile

SUM = Config(rows=1, width=256, warps=4, stages=1)
SKETCH_BLOCK = 32


def squared_norm_direct(
    x_BTD: Tensor, grad_BTP: Tensor, *, target: Target | None = None, runner: Runner = run
) -> Tensor:  # fmt: skip
    """sum((G^T X)^2) per sample."""
    target = target_of(x_BTD.device) if target is None else target
    config = configuration("norm_direct", target, 32)
    tiles = -(-x_BTD.shape[2] // config.width) * -(-grad_BTP.shape[2] // config.width)
    dot = (config.width, config.width, config.rows)
    return _norm(norm_direct, x_BTD, grad_BTP, config, tiles, dot, runner)


def squared_norm_ghost(
    x_BTD: Tensor, grad_BTP: Tensor, *, target: Target | None = None, runner: Runner = run
) -> Tensor:  # fmt: skip
    """sum_{t,t'} (x_t . x_t') (g_t . g_t') per sample, half of the tiles computed."""
    target = target_of(x_BTD.device) if target is None else target
    config = configuration("norm_ghost", target, 32)
    side = -(-x_BTD.shape[1] // config.rows)
    dot = (config.rows, config.rows, config.width)
    return _norm(norm_ghost, x_BTD, grad_BTP, config, side * side, dot, runner)


def _norm(
    kernel: Any, x_BTD: Tensor, grad_BTP: Tensor, config: Config, tiles: int, dot: tuple[int, int, int], runner: Runner
) -> Tensor:
    x_BTD, grad_BTP = x_BTD.contiguous(), grad_BTP.contiguous()
    samples = x_BTD.shape[0]
    dtype = torch.promote_types(torch.promote_types(x_BTD.dtype, grad_BTP.dtype), torch.float32)
    total_B = x_BTD.new_empty(samples, dtype=dtype)
    if x_BTD.numel() == 0 or grad_BTP.numel() == 0:
        return total_B.zero_()
    partial = x_BTD.new_empty((samples, tiles), dtype=dtype)
    arguments = computing(dtype) | {
        "x": x_BTD,
        "grad": grad_BTP,
        "partial": partial,
        "out": total_B,
        "T": x_BTD.shape[1],
        "P": grad_BTP.shape[2],
        "D": x_BTD.shape[2],
        "count": tiles,
        "ROWS": config.rows,
        "WIDTH": config.width,
        "SIZE": SUM.width,
    }
    reads = {"x": size(x_BTD), "G": size(grad_BTP)}
    writes = {"partial": size(partial)}
    runner(Launch.bound(kernel, arguments, grid=partial.numel(), config=config, dots=[dot], reads=reads, writes=writes))
    runner(Launch.bound(add_samples, arguments, grid=samples, config=SUM, reads=writes, writes={"norm": size(total_B)}))
    return total_B


def accumulate_gradient(
    buffer_PD: Tensor, x_ND: Tensor, grad_NP: Tensor, *, target: Target | None = None, runner: Runner = run
) -> None:
    """buffer += G^T X."""
    target = target_of(x_ND.device) if target is None else target
    if x_ND.shape[0] == 0 or buffer_PD.numel() == 0:
        return
    if buffer_PD.stride(1) != 1:
        raise ValueError(
            f"buffer has strides {buffer_PD.stride()}; expected neighbouring in_features, as it is changed in place. "
            f"Allocate torch.zeros{tuple(buffer_PD.shape)}."
        )
    x_ND, grad_NP = rows_of(x_ND), rows_of(grad_NP)
    config = configuration("norm_direct", target, buffer_PD.element_size() * 8)
    arguments = computing(buffer_PD.dtype) | {
        "buffer": buffer_PD,
        "x": x_ND,
        "grad": grad_NP,
        "buffer_step": buffer_PD.stride(0),
        "x_step": x_ND.stride(0),
        "grad_step": grad_NP.stride(0),
        "T": x_ND.shape[0],
        "P": grad_NP.shape[1],
        "D": x_ND.shape[1],
        "ROWS": config.rows,
        "WIDTH": config.width,
    }
    runner(
        Launch.bound(
            accumulate,
            arguments,
            grid=-(-grad_NP.shape[1] // config.width) * -(-x_ND.shape[1] // config.width),
            config=config,
            dots=[(config.width, config.width, config.rows)],
            reads={"x": size(x_ND), "G": size(grad_NP), "buffer": size(buffer_PD)},
            writes={"buffer": size(buffer_PD)},
        )
    )


def accumulate_sketch(
    sketch_KL: Tensor, x_ND: Tensor, grad_NP: Tensor, left_PK: Tensor, right_DL: Tensor, *,
    target: Target | None = None, runner: Runner = run,
) -> None:  # fmt: skip
    """Y += (G L)^T (X R), the projections of a tile of rows never written."""
    target = target_of(x_ND.device) if target is None else target
    if x_ND.shape[0] == 0 or sketch_KL.numel() == 0:
        return
    if not sketch_KL.is_contiguous():
        raise ValueError(
            f"sketch has strides {sketch_KL.stride()}; expected a contiguous one, since it is changed in place. "
            f"Allocate torch.zeros{tuple(sketch_KL.shape)}."
        )
    x_ND, grad_NP, left_PK, right_DL = rows_of(x_ND), rows_of(grad_NP), left_PK.contiguous(), right_DL.contiguous()
    config = configuration("sketch", target, sketch_KL.element_size() * 8)
    tiles = -(-x_ND.shape[0] // config.rows)
    partial = torch.empty((tiles, *sketch_KL.shape), dtype=sketch_KL.dtype, device=sketch_KL.device)
    arguments = computing(sketch_KL.dtype) | {
        "x": x_ND,
        "grad": grad_NP,
        "left": left_PK,
        "right": right_DL,
        "partial": partial,
        "out": sketch_KL,
        "N": x_ND.shape[0],
        "P": grad_NP.shape[1],
        "D": x_ND.shape[1],
        "K": sketch_KL.shape[0],
        "L": sketch_KL.shape[1],
        "x_step": x_ND.stride(0),
        "grad_step": grad_NP.stride(0),
        "count": tiles,
        "columns": sketch_KL.numel(),
        "ROWS": config.rows,
        "WIDTH": config.width,
        "BLOCK_K": SKETCH_BLOCK,
        "BLOCK_L": SKETCH_BLOCK,
        "ADD": True,
        "SIZE": SUM.width,
    }
    sketch_blocks = -(-sketch_KL.shape[0] // SKETCH_BLOCK) * -(-sketch_KL.shape[1] // SKETCH_BLOCK)
    runner(
        Launch.bound(
            sketch_tile,
            arguments,
            grid=tiles * sketch_blocks,
            config=config,
            dots=[(config.rows, SKETCH_BLOCK, config.width), (SKETCH_BLOCK, SKETCH_BLOCK, config.rows)],
            reads={"x": size(x_ND), "G": size(grad_NP), "L": size(left_PK), "R": size(right_DL)},
            writes={"partial": size(partial)},
        )
    )
    runner(
        Launch.bound(
            add_rows,
            arguments,
            grid=-(-sketch_KL.numel() // SUM.width),
            config=SUM,
            reads={"partial": size(partial), "sketch": size(sketch_KL)},
            writes={"sketch": size(sketch_KL)},
        )
    )
