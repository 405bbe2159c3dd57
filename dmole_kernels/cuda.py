# SPDX-License-Identifier: Apache-2.0
"""
    available  <=>  the compiled extension `dmole_kernels._C` was built with CUDA

The "cuda" backend: CUDA C++ (csrc/cuda/) for what a decode step needs, the forward of multi_lora for 1 to 16 rows, and
the row map of a gate computed on the device. All other calls raise, with the reason and the remedy.

Nothing is packed: the kernels read the experts in place, by the Triton backend's table of columns, and only those whose
gate is not zero. Strided features of x or of an expert cost a copy, as do experts of several dtypes and gates of
another dtype than float32. For CUDA graphs, run the step once before the capture: the first one builds that table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from dmole_kernels import cpu
from dmole_kernels._lora_call import LoraCall
from dmole_kernels.triton_backend.columns import expert_columns, one_dtype, rows_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_ROWS = 16
OPS = ("cuda_decode", "cuda_row_map")
_LOAD_BYTES = 16
_REMEDY = "Pass backend='triton' or backend='reference' for this call."


def _missing() -> str:
    """Why there are no CUDA kernels here; "" where there are."""
    if cpu.EXTENSION is None:
        return cpu.MISSING
    if all(hasattr(torch.ops.dmole_kernels, name) for name in OPS):
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    return "dmole_kernels._C was built without nvcc, or of older sources"


MISSING = _missing()


def multi_lora_forward(call: LoraCall) -> tuple[Tensor, Tensor]:
    """y and S as `reference.multi_lora_forward`, but S is zero where the gate is.

    Raises:
        ValueError: for more than 16 rows, or dropout.
    """
    x, base = call.x, call.base
    assert x is not None
    if call.rows > MOST_ROWS:
        raise ValueError(
            f"backend='cuda' got {call.rows} rows of x; expected at most {MOST_ROWS}, a decode step. {_REMEDY}"
        )
    if call.seed is not None:
        raise ValueError(
            f"backend='cuda' got dropout={call.dropout}; expected 0, since its kernels are for inference and draw no "
            f"masks. Put the layer in eval() or pass backend='triton' or backend='reference'."
        )
    dtype, outputs = call.dtype, call.outputs
    a, b = _experts(call.lora_a, call.lora_b, dtype)
    columns = expert_columns(a, b, call.scale, block=MOST_ROWS, per_expert=False)
    y_NP, s_NR = torch.ops.dmole_kernels.cuda_decode(
        rows_of(x.to(dtype)),
        None if base is None else rows_of(base.to(dtype)),
        call.gate.to(torch.float32).contiguous(),
        columns.table,
        columns.experts,
        outputs,
        columns.a_dtype,
        columns.a_aligned,
        columns.b_run * columns.b_dtype.itemsize == _LOAD_BYTES,
    )
    return y_NP.view(*x.shape[:-1], outputs), s_NR


def multi_lora_backward(*_arguments: object) -> NoReturn:
    """Raises ValueError: decoding has no backward."""
    raise ValueError(f"backend='cuda' has no backward of multi_lora; expected a decode step. {_REMEDY}")


def row_map(gate_GE: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The rows that use each expert, computed on the gate's device without host synchronisation.

    Returns the int32 numbers of `RowMap.table`, {rows, experts, pairs}, start, row, flags, in a tensor with room for
    every pair (elements after the table are not written), and int32 [tiles, ceil(experts / 32)]: bit e of a tile is set
    where one of its 32 rows needs expert e.
    """
    table, needed = torch.ops.dmole_kernels.cuda_row_map(gate_GE.to(torch.float32).contiguous(), rows)
    return table, needed


def _experts(lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], ...]:
    """Unchanged where all are float32 or all the working dtype with contiguous rows, else copies."""
    experts = one_dtype([*lora_a, *lora_b], dtype)
    if experts[0].dtype not in (dtype, torch.float32):
        experts = [expert.to(dtype) for expert in experts]
    return experts[: len(lora_a)], experts[len(lora_a) :]
