# SPDX-License-Identifier: Apache-2.0
"""
`reference.multi_lora_forward` and `_backward` as Triton launches (the equations: `dmole_kernels._multi_lora`):

    forward    shrink, expand                                                      base + 2
    backward   shrink_gradient, weight_gradient, finish, input_gradient            base + 4, whatever the experts

Nothing is packed, sorted or copied: experts are read where they lie (`columns`), and which column blocks a row tile
needs is found by the first launch of each direction (`shrink`). Strided features of x or A cost a copy, as does a list
of experts of several dtypes. `runner` receives each launch in order: it runs them, or counts or compiles them.
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

# Programs that keep the largest of the table's GPUs (132 and 148 multiprocessors) busy: a sum over rows is cut into
# shares until there are so many, while their partial sums, written and read once, stay under a tenth of the bytes.
ENOUGH_PROGRAMS, MOST_SHARES = 256, 8
FINISH = Config(rows=64, width=1024, warps=4, stages=1)


def multi_lora_forward(call: LoraCall, *, target: Target | None = None, runner: Runner = run) -> tuple[Tensor, Tensor]:
    """y and S as `reference.multi_lora_forward`.

    With every_column False, S is zero instead of computed where a column block has no gate on in a row tile; True where
    backward will be asked for dg, because a gate of zero needs its gradient. `row_map` is not read.
    """
    x, base, dtype = call.x, call.base, call.dtype
    assert x is not None
    target = target_of(x.device) if target is None else target
    columns, facts = shrink_rows(call, dtype, target, runner)
    s_NR, outputs = facts["shrunk"], facts["P"]
    y = x.new_empty((*x.shape[:-1], outputs), dtype=dtype)
    if y.numel() == 0:
        return y, s_NR
    base_NP = None if base is None else rows_of(base)
    config = configuration("expand", target, dtype.itemsize * 8)
    runner(
        Launch.bound(
            expand,
            facts
            | row_tile(config, facts)
            | {
                "HAS_BASE": base is not None,
                "base": y if base_NP is None else base_NP,
                "y": y,
                "base_step": outputs if base_NP is None else base_NP.stride(0),
            },
            grid=-(-s_NR.shape[0] // config.rows) * -(-outputs // config.width),
            config=config,
            dots=[(config.rows, config.width, columns.block)],
            reads={"S": size(s_NR), "B": columns.bytes_b, "base": size(base_NP), "plan": plan_bytes(facts)},
            writes={"y": size(y)},
        )
    )
    return y, s_NR


def shrink_rows(call: LoraCall, dtype: torch.dtype, target: Target, runner: Runner) -> tuple[Columns, dict[str, Any]]:
    """The first launch of a forward, and the facts that the second needs: S, the flags, and what both share."""
    x, outputs = call.x, call.outputs
    assert x is not None
    x_ND = rows_of(x)
    columns, owners = _columns(call, dtype)
    s_NR = x.new_empty((x_ND.shape[0], columns.count), dtype=dtype)
    config = configuration("shrink", target, dtype.itemsize * 8)
    flags = _flags(x_ND, columns, config)
    facts = _facts(dtype, columns, owners, call.gate.contiguous(), flags, x_ND.shape[0], config) | {
        **mask_arguments(call.dropout, call.seed, x.device),
        "LOOK": "none" if flags.shape[1] == 1 else "flag" if call.every_column else "skip",
        "x": x_ND,
        "shrunk": s_NR,
        "D": x_ND.shape[1],
        "P": outputs,
        "x_step": x_ND.stride(0),
    }
    if x_ND.shape[0] == 0 or outputs == 0:
        s_NR.zero_()
        return columns, facts
    runner(
        Launch.bound(
            shrink,
            facts | row_tile(config, facts),
            grid=flags.numel(),
            config=config,
            dots=[(config.rows, columns.block, config.width)],
            reads={"x": size(x_ND), "A": columns.bytes_a, "plan": table_bytes(facts)},
            writes={"S": size(s_NR), "flags": 0 if facts["ONE_BLOCK"] else size(flags)},
        )
    )
    return columns, facts


def multi_lora_backward(
    call: LoraCall, grad: Tensor, s_NR: Tensor | None, wanted: Wanted, *, target: Target | None = None,
    runner: Runner = run,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dA, dB^T and dg as `reference.multi_lora_backward`; what is not wanted is empty and not computed."""
    target = target_of(grad.device) if target is None else target
    dtype, bits = grad.dtype, grad.dtype.itemsize * 8
    wide = torch.promote_types(dtype, torch.float32)
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
    products_NR = torch.empty((rows, columns.count) if need_gate else 0, dtype=wide, device=grad.device)
    tiling = configuration("weight_gradient", target, bits)
    learning = columns.learning.numel()
    tiles = (-(-features // tiling.width) + -(-outputs // tiling.width)) * learning
    shares = _shares(tiles, rows, tiling.rows, columns.gradient_rows, dtype.itemsize) if need_weights else 1
    partial_a, partial_b = (
        torch.empty((shares, *t.shape), dtype=wide, device=grad.device) if shares > 1 else t for t in (da, db)
    )
    facts = _facts(dtype, columns, owners, gate_GE, flags, rows, config) | {
        **mask_arguments(call.dropout, call.seed, grad.device),
        "NEED_GATE": need_gate,
        "WEIGHTS": shares > 1,
        "TOKEN_GATES": gate_GE.shape[0] == rows,
        "x": x_ND,
        "grad": grad_NP,
        "shrunk": ds_NR if s_NR is None else s_NR,
        "dshrunk": ds_NR,
        "products": products_NR,
        "learning": columns.learning,
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
        "learning_count": learning,
        "row_count": columns.gradient_rows,
        "shares": shares,
        "count_a": da.numel(),
        "count_b": db.numel(),
    }
    runner(
        Launch.bound(
            shrink_gradient,
            facts | row_tile(config, facts),
            grid=flags.numel(),
            config=config,
            dots=[(config.rows, columns.block, config.width)],
            reads={
                "dY": size(grad_NP),
                "B": columns.bytes_b,
                "S": size(s_NR) if need_gate else 0,
                "plan": table_bytes(facts),
            },
            writes={"dS": size(ds_NR), "P * S": size(products_NR), "flags": size(flags)},
        )
    )
    if need_weights:
        config = tiling
        runner(
            Launch.bound(
                weight_gradient,
                facts | row_tile(config, facts),
                grid=tiles * shares,
                config=config,
                dots=[(columns.block, config.width, config.rows)],
                reads={
                    "x": size(x_ND),
                    "dY": size(grad_NP),
                    "S": size(s_NR),
                    "dS": size(ds_NR),
                    "plan": plan_bytes(facts) + size(columns.learning),
                },
                writes={"dA": size(partial_a), "dB": size(partial_b)},
            )
        )
    if shares > 1 or need_gate:
        config = FINISH
        # The programs of `finish`: dA's, dB's, then the gates'.
        sums = -(-da.numel() // config.width) + -(-db.numel() // config.width) if shares > 1 else 0
        gate_groups = -(-rows // config.rows) if facts["TOKEN_GATES"] else gate_GE.shape[0]
        runner(
            Launch.bound(
                finish,
                facts | {"SIZE": config.width, "ROWS": config.rows},
                grid=sums + (gate_groups * gate_GE.shape[1] if need_gate else 0),
                config=config,
                reads={
                    "partial": size(partial_a, partial_b) if shares > 1 else 0,
                    "P * S": size(products_NR),
                    "plan": size(columns.table, columns.experts) if need_gate else 0,
                },
                writes={"dA, dB": size(da, db) if shares > 1 else 0, "dg": size(dgate)},
            )
        )
    if wanted.x:
        config = configuration("input_gradient", target, bits)
        runner(
            Launch.bound(
                input_gradient,
                facts | row_tile(config, facts),
                grid=-(-rows // config.rows) * -(-features // config.width),
                config=config,
                dots=[(config.rows, config.width, columns.block)],
                reads={"dS": size(ds_NR), "A": columns.bytes_a, "plan": plan_bytes(facts)},
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
    """int32 [row tiles of the first launch, column blocks]: 1 where some gate is on."""
    groups = -(-rows_NX.shape[0] // config.rows)
    return torch.empty((groups, columns.blocks.shape[0]), dtype=torch.int32, device=rows_NX.device)


def _facts(
    dtype: torch.dtype,
    columns: Columns,
    owners: Sequence[Tensor],
    gate_GE: Tensor,
    flags: Tensor,
    rows: int,
    flagged: Config,
) -> dict[str, Any]:
    """What all launches of a call share, by the names of the kernels' parameters."""
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


def _shares(tiles: int, rows: int, tile_rows: int, gradient_rows: int, element: int) -> int:
    """Into how many shares the sums over rows are cut; no more than there are row tiles."""
    # A share costs 8 bytes for every gradient element, the launches of backward read or write 5 tensors of `rows` rows.
    affordable = rows * element // (36 * gradient_rows)
    return max(1, min(MOST_SHARES, affordable, -(-ENOUGH_PROGRAMS // tiles), -(-rows // tile_rows)))


def row_tile(config: Config, facts: dict[str, Any]) -> dict[str, int]:
    """The tile's sides, and how many row groups of `flags` its rows are (configs.py keeps it a whole number)."""
    return {"ROWS": config.rows, "WIDTH": config.width, "RATIO": config.rows // facts["flagged_rows"]}


def table_bytes(facts: dict[str, Any]) -> int:
    """What every launch reads beside the matrices: addresses, blocks and gates."""
    return size(facts["table"], facts["blocks"], facts["gate"])


def plan_bytes(facts: dict[str, Any]) -> int:
    """The same with the flags that the first launch wrote."""
    return table_bytes(facts) + size(facts["flags"])
