# SPDX-License-Identifier: Apache-2.0
"""
`reference.multi_lora_forward` and `_backward` as Triton launches (the equations: `dmole_kernels._multi_lora`):

    forward    shrink, expand                                                      base + 2
    backward   shrink_gradient, weight_gradient, finish, input_gradient            base + 4, whatever the experts

Nothing is packed, sorted or copied: experts are read in place (`columns`), and the first launch of each direction
(`shrink`) determines the column blocks that each row tile needs. Strided features of x or A cost a copy, as does a list
of experts of several dtypes. `runner` receives each launch in order: it runs, counts or compiles them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dmole_kernels._lora_call import LoraCall, Wanted
from dmole_kernels.triton_backend.columns import Columns, expert_columns, one_dtype, rows_of
from dmole_kernels.triton_backend.configs import Config, Target, column_block, configuration
from dmole_kernels.triton_backend.dropout import mask_arguments
from dmole_kernels.triton_backend.expand import expand, input_gradient
from dmole_kernels.triton_backend.finish import finish
from dmole_kernels.triton_backend.launch import TYPES, Launch, Runner, computing, run, size, target_of
from dmole_kernels.triton_backend.shrink import shrink, shrink_gradient
from dmole_kernels.triton_backend.weight_gradient import weight_gradient

# Programs that keep the largest of the table's GPUs (132 and 148 multiprocessors) busy: a sum over rows is split
# until there are that many, while the partial sums, written and read once, stay under a tenth of the bytes.
ENOUGH_PROGRAMS, MOST_SPLITS = 256, 8
FINISH = Config(rows=64, width=1024, warps=4, stages=1)


def multi_lora_forward(call: LoraCall, *, target: Target | None = None, runner: Runner = run) -> tuple[Tensor, Tensor]:
    """y and S as `reference.multi_lora_forward`.

    With every_column False, S is zero where a column block has no active gate in a row tile; pass True where backward
    computes dg, because a gate of zero needs its gradient. `row_map` is not read.
    """
    x, base, dtype = call.x, call.base, call.dtype
    assert x is not None
    target = target_of(x.device) if target is None else target
    columns, arguments = shrink_rows(call, dtype, target, runner)
    s_NR, outputs = arguments["shrunk"], arguments["P"]
    y = x.new_empty((*x.shape[:-1], outputs), dtype=dtype)
    if y.numel() == 0:
        return y, s_NR
    base_NP = None if base is None else rows_of(base)
    config = configuration("expand", target, dtype.itemsize * 8)
    runner(
        Launch.bound(
            expand,
            arguments
            | row_tile(config, arguments)
            | {
                "HAS_BASE": base is not None,
                "base": y if base_NP is None else base_NP,
                "y": y,
                "base_step": outputs if base_NP is None else base_NP.stride(0),
            },
            grid=-(-s_NR.shape[0] // config.rows) * -(-outputs // config.width),
            config=config,
            dots=[(config.rows, config.width, columns.block)],
            reads={
                "S": size(s_NR),
                "B": columns.bytes_b,
                "base": size(base_NP),
                "metadata": metadata_and_flag_bytes(arguments),
            },
            writes={"y": size(y)},
        )
    )
    return y, s_NR


def shrink_rows(call: LoraCall, dtype: torch.dtype, target: Target, runner: Runner) -> tuple[Columns, dict[str, Any]]:
    """The first launch of forward; returns the columns and the arguments of the second launch (S, flags, ...)."""
    x, outputs = call.x, call.outputs
    assert x is not None
    x_ND = rows_of(x)
    columns, owners = _columns(call, dtype)
    s_NR = x.new_empty((x_ND.shape[0], columns.count), dtype=dtype)
    config = configuration("shrink", target, dtype.itemsize * 8)
    flags = _flags(x_ND, columns, config)
    arguments = _launch_arguments(dtype, columns, owners, call.gate.contiguous(), flags, x_ND.shape[0], config) | {
        **mask_arguments(call.dropout, call.seed, x.device),
        "FLAG_MODE": "none" if flags.shape[1] == 1 else "flag" if call.every_column else "skip",
        "x": x_ND,
        "shrunk": s_NR,
        "D": x_ND.shape[1],
        "P": outputs,
        "x_step": x_ND.stride(0),
    }
    if x_ND.shape[0] == 0 or outputs == 0:
        s_NR.zero_()
        return columns, arguments
    runner(
        Launch.bound(
            shrink,
            arguments | row_tile(config, arguments),
            grid=flags.numel(),
            config=config,
            dots=[(config.rows, columns.block, config.width)],
            reads={"x": size(x_ND), "A": columns.bytes_a, "metadata": metadata_bytes(arguments)},
            writes={"S": size(s_NR), "flags": 0 if arguments["ONE_BLOCK"] else size(flags)},
        )
    )
    return columns, arguments


def multi_lora_backward(
    call: LoraCall, grad: Tensor, s_NR: Tensor | None, wanted: Wanted, *, target: Target | None = None,
    runner: Runner = run,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dA, dB^T and dg as `reference.multi_lora_backward`; gradients that are not requested are empty."""
    target = target_of(grad.device) if target is None else target
    dtype, bits = grad.dtype, grad.dtype.itemsize * 8
    sum_dtype = torch.promote_types(dtype, torch.float32)
    grad_NP, gate_GE = rows_of(grad), call.gate.contiguous()
    rows, outputs = grad_NP.shape
    features = call.lora_a[0].shape[1]
    columns, owners = _columns(call, dtype, wanted.experts)
    x_ND = None if call.x is None or columns.gradient_rows == 0 else rows_of(call.x)
    trains = any(wanted.experts) and call.x is not None and s_NR is not None
    need_weights = trains and columns.gradient_rows > 0  # none where all trainable experts have rank 0
    need_gate = wanted.gate and s_NR is not None
    dx = grad.new_empty((*grad.shape[:-1], features) if wanted.x else 0)
    da = grad.new_empty((columns.gradient_rows, features) if trains else 0)
    db = grad.new_empty((columns.gradient_rows, outputs) if trains else 0)
    dgate = gate_GE.new_empty(gate_GE.shape if need_gate else 0)
    if grad_NP.numel() == 0:
        return dx.zero_(), da.zero_(), db.zero_(), dgate.zero_()

    config = configuration("shrink_gradient", target, bits)
    flags = _flags(grad_NP, columns, config)
    ds_NR = grad.new_empty((rows, columns.count))
    products_NR = torch.empty((rows, columns.count) if need_gate else 0, dtype=sum_dtype, device=grad.device)
    tiling = configuration("weight_gradient", target, bits)
    trainable_block_count = columns.trainable_blocks.numel()
    tiles = (-(-features // tiling.width) + -(-outputs // tiling.width)) * trainable_block_count
    splits = _split_count(tiles, rows, tiling.rows, columns.gradient_rows, dtype.itemsize) if need_weights else 1
    partial_a, partial_b = (
        torch.empty((splits, *t.shape), dtype=sum_dtype, device=grad.device) if splits > 1 else t for t in (da, db)
    )
    arguments = _launch_arguments(dtype, columns, owners, gate_GE, flags, rows, config) | {
        **mask_arguments(call.dropout, call.seed, grad.device),
        "NEED_GATE": need_gate,
        "WEIGHTS": splits > 1,
        "TOKEN_GATES": gate_GE.shape[0] == rows,
        "x": x_ND,
        "grad": grad_NP,
        "shrunk": ds_NR if s_NR is None else s_NR,
        "dshrunk": ds_NR,
        "products": products_NR,
        "trainable_blocks": columns.trainable_blocks,
        "experts": columns.experts,
        "partial_a": partial_a,
        "partial_b": partial_b,
        "da": da,
        "db": db,
        "dx": dx,
        "dgate": dgate,
        "D": features,
        "P": outputs,
        "G": gate_GE.shape[0],
        "x_step": features if x_ND is None else x_ND.stride(0),
        "grad_step": grad_NP.stride(0),
        "trainable_block_count": trainable_block_count,
        "row_count": columns.gradient_rows,
        "splits": splits,
        "count_a": da.numel(),
        "count_b": db.numel(),
    }
    runner(
        Launch.bound(
            shrink_gradient,
            arguments | row_tile(config, arguments),
            grid=flags.numel(),
            config=config,
            dots=[(config.rows, columns.block, config.width)],
            reads={
                "dY": size(grad_NP),
                "B": columns.bytes_b,
                "S": size(s_NR) if need_gate else 0,
                "metadata": metadata_bytes(arguments),
            },
            writes={"dS": size(ds_NR), "P * S": size(products_NR), "flags": size(flags)},
        )
    )
    if need_weights:
        config = tiling
        runner(
            Launch.bound(
                weight_gradient,
                arguments | row_tile(config, arguments),
                grid=tiles * splits,
                config=config,
                dots=[(columns.block, config.width, config.rows)],
                reads={
                    "x": size(x_ND),
                    "dY": size(grad_NP),
                    "S": size(s_NR),
                    "dS": size(ds_NR),
                    "metadata": metadata_and_flag_bytes(arguments) + size(columns.trainable_blocks),
                },
                writes={"dA": size(partial_a), "dB": size(partial_b)},
            )
        )
    if splits > 1 or need_gate:
        config = FINISH
        # The programs of `finish`: dA's, dB's, then the gates'.
        sums = -(-da.numel() // config.width) + -(-db.numel() // config.width) if splits > 1 else 0
        gate_groups = -(-rows // config.rows) if arguments["TOKEN_GATES"] else gate_GE.shape[0]
        runner(
            Launch.bound(
                finish,
                arguments | {"SIZE": config.width, "ROWS": config.rows},
                grid=sums + (gate_groups * gate_GE.shape[1] if need_gate else 0),
                config=config,
                reads={
                    "partial": size(partial_a, partial_b) if splits > 1 else 0,
                    "P * S": size(products_NR),
                    "metadata": size(columns.table, columns.experts) if need_gate else 0,
                },
                writes={"dA, dB": size(da, db) if splits > 1 else 0, "dg": size(dgate)},
            )
        )
    if wanted.x:
        config = configuration("input_gradient", target, bits)
        runner(
            Launch.bound(
                input_gradient,
                arguments | row_tile(config, arguments),
                grid=-(-rows // config.rows) * -(-features // config.width),
                config=config,
                dots=[(config.rows, config.width, columns.block)],
                reads={"dS": size(ds_NR), "A": columns.bytes_a, "metadata": metadata_and_flag_bytes(arguments)},
                writes={"dx": size(dx)},
            )
        )
    return dx, da, db, dgate


def _columns(
    call: LoraCall, dtype: torch.dtype, trainable: Sequence[bool] | None = None
) -> tuple[Columns, list[Tensor]]:
    """The table of the experts, and the tensors whose addresses it holds: the experts, or copies in one dtype."""
    per_expert = call.per_expert and call.seed is not None
    block = column_block(max(call.ranks) if per_expert else sum(call.ranks))
    a, b = one_dtype(call.lora_a, dtype), one_dtype(call.lora_b, dtype, any_strides=True)
    owners = [*a, *b]
    keep = all(owner is expert for owner, expert in zip(owners, (*call.lora_a, *call.lora_b), strict=True))
    return expert_columns(a, b, call.scale, block, per_expert, trainable, keep=keep), owners


def _flags(rows_NX: Tensor, columns: Columns, config: Config) -> Tensor:
    """int32 [row tiles of the first launch, column blocks]: 1 where a gate is not zero."""
    groups = -(-rows_NX.shape[0] // config.rows)
    return torch.empty((groups, columns.blocks.shape[0]), dtype=torch.int32, device=rows_NX.device)


def _launch_arguments(
    dtype: torch.dtype,
    columns: Columns,
    owners: Sequence[Tensor],
    gate_GE: Tensor,
    flags: Tensor,
    rows: int,
    flagged: Config,
) -> dict[str, Any]:
    """The arguments that all launches of a call have in common, by the names of the kernels' parameters."""
    return computing(dtype) | {
        "BLOCK_R": columns.block,
        "PER_EXPERT": columns.per_expert,
        "ONE_BLOCK": flags.shape[1] == 1,
        "A_TYPE": TYPES[columns.a_dtype],
        "B_TYPE": TYPES[columns.b_dtype],
        "A_ALIGNED": columns.a_aligned,
        "B_RUN": columns.b_run,
        "table": columns.table,
        "owners": owners,
        "blocks": columns.blocks,
        "gate": gate_GE,
        "flags": flags,
        "N": rows,
        "R": columns.count,
        "E": gate_GE.shape[1],
        "rows_per_gate": rows // max(1, gate_GE.shape[0]),
        "block_count": flags.shape[1],
        "flag_rows": flags.shape[0],
        "flagged_rows": flagged.rows,
    }


def _split_count(tiles: int, rows: int, tile_rows: int, gradient_rows: int, element: int) -> int:
    """The number of splits of the sums over rows, at most the number of row tiles."""
    # A split costs 8 bytes for every gradient element, the launches of backward read or write 5 tensors of `rows` rows.
    affordable = rows * element // (36 * gradient_rows)
    return max(1, min(MOST_SPLITS, affordable, -(-ENOUGH_PROGRAMS // tiles), -(-rows // tile_rows)))


def row_tile(config: Config, arguments: dict[str, Any]) -> dict[str, int]:
    """The sides of the tile, and its rows in row groups of `flags` (a whole number, see configs.py)."""
    return {"ROWS": config.rows, "WIDTH": config.width, "RATIO": config.rows // arguments["flagged_rows"]}


def metadata_bytes(arguments: dict[str, Any]) -> int:
    """Bytes that every launch reads in addition to the matrices: addresses, blocks and gates."""
    return size(arguments["table"], arguments["blocks"], arguments["gate"])


def metadata_and_flag_bytes(arguments: dict[str, Any]) -> int:
    """The same including the flags that the first launch wrote."""
    return metadata_bytes(arguments) + size(arguments["flags"])
