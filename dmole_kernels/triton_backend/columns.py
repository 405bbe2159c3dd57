# SPDX-License-Identifier: Apache-2.0
"""
    table[:, j] = (address of A's row j, address of B's column j, step between B's rows, expert, scale, gradient row)

Packed columns without packing: a table of addresses on the device lets one kernel read any number of experts of any
ranks in place, in their own dtype, so neither launches nor bytes depend on how they are stored.

A table is cached under the addresses and numbers in it and never evicted: 48 bytes a column, about 3 KiB for a layer.
Building one copies it to the device once; later steps find it in the cache. For CUDA graphs, run the step once before
the capture, as Triton's compilation requires too.

A table does not keep experts alive: callers do until the launch (`Launch.owners`). The table of cast copies is built
for one call and not cached, since their addresses belong to other tensors afterwards.

Column blocks: `block` neighbouring columns, or with a mask for each expert, blocks that end where the expert ends.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

A_ADDRESS, B_ADDRESS, B_STEP, EXPERT, SCALE, GRADIENT_ROW = range(6)
MASKED = -1


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The packed columns of one call; tensors on the experts' device."""

    table: Tensor  # int64 [6, R]
    blocks: Tensor  # int32 [blocks, 4]: first column, columns, stream of the mask, whether an expert in it is trainable
    experts: Tensor  # int32 [E, 2]: first column, rank
    ranks: tuple[int, ...]
    block: int
    per_expert: bool  # blocks end where an expert ends
    trainable_blocks: Tensor  # int32: the blocks with a trainable expert
    gradient_rows: int
    a_aligned: bool  # every row of A begins at a multiple of 16 bytes
    b_run: int  # neighbouring columns of B that are contiguous and aligned: 1, 2, 4 or 8
    a_dtype: torch.dtype
    b_dtype: torch.dtype
    bytes_a: int
    bytes_b: int

    @property
    def count(self) -> int:
        return sum(self.ranks)


_tables: dict[tuple[object, ...], Columns] = {}


def expert_columns(
    lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scale: Sequence[float], block: int, per_expert: bool,
    trainable: Sequence[bool] | None = None, *, keep: bool = True,
) -> Columns:  # fmt: skip
    """The table for these experts, new or cached. Experts have one dtype and A has contiguous rows.

    Pass keep=False for experts that are copies made for this call.
    """
    if not keep:
        return _build(lora_a, lora_b, scale, block, per_expert, trainable)
    key = (
        lora_a[0].device, lora_a[0].dtype, lora_b[0].dtype, block, per_expert, tuple(scale),
        None if trainable is None else tuple(trainable),
        tuple((a.data_ptr(), *a.shape, a.stride(0), b.data_ptr(), *b.shape, *b.stride())
              for a, b in zip(lora_a, lora_b, strict=True)),
    )  # fmt: skip
    if key not in _tables:
        _tables[key] = _build(lora_a, lora_b, scale, block, per_expert, trainable)
    return _tables[key]


def one_dtype(experts: Sequence[Tensor], dtype: torch.dtype, *, any_strides: bool = False) -> list[Tensor]:
    """The experts unchanged when they have one dtype and contiguous rows (or any_strides), else copies cast to `dtype`,
    which the caller keeps alive until the launch."""
    if all(e.dtype == experts[0].dtype and (any_strides or e.stride(1) == 1 or e.shape[1] == 1) for e in experts):
        return list(experts)
    return [e.to(dtype).contiguous() for e in experts]


def rows_of(tensor: Tensor) -> Tensor:
    """[rows, features] with neighbouring features; a copy only where the last dimension is strided."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def column_blocks(ranks: Sequence[int], block: int, per_expert: bool) -> list[tuple[int, int, int]]:
    """(first column, columns, stream): blocks of the packed columns, or of each expert's own."""
    spans = [(0, sum(ranks), 0)]
    if per_expert:
        spans = [(stop - rank, rank, e) for e, (stop, rank) in enumerate(zip(accumulate(ranks), ranks, strict=True))]
    return [
        (first + offset, min(block, columns - offset), stream)
        for first, columns, stream in spans
        for offset in range(0, columns, block)
    ]


def _build(
    lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scale: Sequence[float], block: int, per_expert: bool,
    trainable: Sequence[bool] | None,
) -> Columns:  # fmt: skip
    ranks = tuple(a.shape[0] for a in lora_a)
    rows: list[list[int]] = [[] for _ in range(6)]
    gradient_row = 0
    for e, (a, b, factor) in enumerate(zip(lora_a, lora_b, scale, strict=True)):
        (bits,) = struct.unpack("<q", struct.pack("<d", factor))
        trains = trainable is not None and trainable[e]
        for j in range(ranks[e]):
            rows[A_ADDRESS].append(a.data_ptr() + j * a.stride(0) * a.element_size())
            rows[B_ADDRESS].append(b.data_ptr() + j * b.stride(1) * b.element_size())
            rows[B_STEP].append(b.stride(0))
            rows[EXPERT].append(e)
            rows[SCALE].append(bits)
            rows[GRADIENT_ROW].append(gradient_row if trains else MASKED)
            gradient_row += trains
    blocks = [
        (first, count, stream, int(any(row != MASKED for row in rows[GRADIENT_ROW][first : first + count])))
        for first, count, stream in column_blocks(ranks, block, per_expert)
    ]
    device = lora_a[0].device
    return Columns(
        table=torch.tensor(rows, dtype=torch.int64).to(device),
        blocks=torch.tensor(blocks, dtype=torch.int32).to(device),
        experts=torch.tensor(
            [(stop - rank, rank) for stop, rank in zip(accumulate(ranks), ranks, strict=True)], dtype=torch.int32
        ).to(device),
        ranks=ranks,
        block=block,
        per_expert=per_expert,
        trainable_blocks=torch.tensor([i for i, entry in enumerate(blocks) if entry[3]], dtype=torch.int32).to(device),
        gradient_rows=gradient_row,
        a_aligned=all(address % 16 == 0 for address in rows[A_ADDRESS]),
        b_run=_run(lora_b, ranks),
        a_dtype=lora_a[0].dtype,
        b_dtype=lora_b[0].dtype,
        bytes_a=sum(a.numel() * a.element_size() for a in lora_a),
        bytes_b=sum(b.numel() * b.element_size() for b in lora_b),
    )


def _run(lora_b: Sequence[Tensor], ranks: Sequence[int]) -> int:
    """A power of two that divides every rank and B's row step, with rows that begin at multiples of its bytes."""
    run = 16 // lora_b[0].element_size()
    while run > 1 and not all(
        rank % run == 0 and b.stride(1) == 1 and b.stride(0) % run == 0 and b.data_ptr() % (run * b.element_size()) == 0
        for b, rank in zip(lora_b, ranks, strict=True)
    ):
        run //= 2
    return run
