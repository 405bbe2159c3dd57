# SPDX-License-Identifier: Apache-2.0
"""One call of multi_lora as a value: what every kernel of every backend receives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True, eq=False)
class LoraCall:
    """The operands and switches of one call (`_multi_lora` has the equations and the shape letters).

    A kernel for the forward is `(call) -> (y, S [N, R])`, one for the backward is
    `(call, dY, S, wanted) -> (dx, dA [R_t, D], dB^T [R_t, P], dg [G, E])`. In the backward `base` is None, and so are x
    and S where nothing that is wanted needs them.
    """

    x: Tensor | None  # [..., D]
    base: Tensor | None  # [..., P]
    lora_a: Sequence[Tensor]  # [rank_e, D]
    lora_b: Sequence[Tensor]  # [P, rank_e]
    gate: Tensor  # [G, E], each row for N / G consecutive rows of x
    scale: Sequence[float]
    dropout: float = 0.0
    per_expert: bool = False
    seed: Tensor | None = None  # None: no dropout
    every_column: bool = True  # the gate needs its gradient, so S is needed for gates of zero too
    row_map: Tensor | None = None  # which rows use which expert, `RowMap.table`; a kernel that needs one makes its own
    packed: PackedExperts | None = None  # the same experts side by side, made once for many calls
    # Several linears with one x (q, k, v), their outputs side by side in y. Pair e is one linear's part of an expert,
    # with B_e [P_e, rank_e], and adds to the P_e columns of y from starts[e] on. None: every pair adds to all columns.
    starts: Sequence[int] | None = None

    @property
    def ranks(self) -> list[int]:
        return [a.shape[0] for a in self.lora_a]

    @property
    def outputs(self) -> int:
        if self.base is not None:
            return self.base.shape[-1]
        if self.starts is None:
            return self.lora_b[0].shape[0]
        return max(start + b.shape[0] for start, b in zip(self.starts, self.lora_b, strict=True))

    def columns(self, pair: int) -> slice:
        """The columns of y that pair (A_e, B_e) adds to."""
        start = 0 if self.starts is None else self.starts[pair]
        return slice(start, start + self.lora_b[pair].shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the computation: base's, else x's."""
        tensor = self.x if self.base is None else self.base
        assert tensor is not None
        return tensor.dtype

    @property
    def rows(self) -> int:
        assert self.x is not None
        return math.prod(self.x.shape[:-1])


@dataclass(slots=True, eq=False)
class PackedExperts:
    """A [R, D] and B^T [R, P], contiguous, in the dtype of the computation: what `pack_experts` made.

    A kernel may read these in place of the lists. They hold the values that the experts had when they were packed, so
    they are for experts that do not change.
    """

    a_RD: Tensor
    b_RP: Tensor


@dataclass(slots=True, eq=False)
class Wanted:
    """Which gradients the backward computes; what is not wanted comes back with zero elements."""

    x: bool
    gate: bool
    experts: Sequence[bool]  # whether expert e is trainable
