# SPDX-License-Identifier: Apache-2.0
"""The multi-LoRA calls that tests and benchmarks make: shapes, switches and random inputs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from dmole_kernels._lora_call import LoraCall


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Shapes and switches of one multi-LoRA call; `leading` are x's dimensions before its features."""

    name: str
    leading: tuple[int, ...]
    in_features: int
    out_features: int
    ranks: tuple[int, ...]
    gate: Literal["sample", "token"] = "sample"
    pattern: Literal["random", "top2", "one_expert", "last_unused", "zero_and_negative"] = "random"
    frozen: tuple[int, ...] = ()
    dropout: float = 0.0
    per_expert: bool = False
    contiguous: bool = True


WORKLOADS = (
    Workload(name="one_row", leading=(1, 1), in_features=8, out_features=8, ranks=(2,)),
    Workload(name="zero_rows", leading=(0, 5), in_features=8, out_features=6, ranks=(2, 3), dropout=0.1),
    Workload(name="zero_tokens", leading=(2, 0), in_features=8, out_features=6, ranks=(2, 3)),
    Workload(name="primes", leading=(3, 7), in_features=37, out_features=53, ranks=(1, 5, 128)),
    Workload(name="token_gates", leading=(3, 7), in_features=31, out_features=17, ranks=(3, 8), gate="token"),
    Workload(name="image_grid", leading=(2, 3, 5), in_features=24, out_features=40, ranks=(4, 4)),
    Workload(name="two_dimensions", leading=(13,), in_features=19, out_features=23, ranks=(7, 1)),
    Workload(
        name="all_frozen", leading=(4, 6), in_features=32, out_features=16, ranks=(4, 8), frozen=(0, 1), dropout=0.2
    ),
    Workload(name="frozen_between", leading=(4, 6), in_features=32, out_features=16, ranks=(4, 8, 2), frozen=(1,)),
    Workload(
        name="old_and_new", leading=(8, 11), in_features=48, out_features=48, ranks=(8, 8), frozen=(0,), dropout=0.05
    ),
    Workload(
        name="zero_and_negative",
        leading=(5, 4),
        in_features=16,
        out_features=24,
        ranks=(4, 6),
        pattern="zero_and_negative",
    ),
    Workload(
        name="one_active_expert",
        leading=(5, 4),
        in_features=16,
        out_features=24,
        ranks=(4, 6, 2),
        pattern="one_expert",
    ),
    Workload(
        name="last_unused",
        leading=(5, 4),
        in_features=16,
        out_features=24,
        ranks=(4, 6),
        pattern="last_unused",
    ),
    Workload(name="dropout_shared", leading=(6, 9), in_features=130, out_features=20, ranks=(4, 3), dropout=0.3),
    Workload(
        name="dropout_per_expert",
        leading=(6, 9),
        in_features=70,
        out_features=20,
        ranks=(4, 3),
        frozen=(0,),
        dropout=0.3,
        per_expert=True,
    ),
    Workload(
        name="strided_x", leading=(4, 5), in_features=33, out_features=12, ranks=(4, 5), dropout=0.1, contiguous=False
    ),
    Workload(
        name="sixteen_top2", leading=(16, 3), in_features=64, out_features=64, ranks=(1, 2, 4, 8) * 4, pattern="top2"
    ),
)


@dataclass(frozen=True, kw_only=True)
class LoraInputs:
    """The arguments of one call, and the gradient of its output."""

    x: Tensor
    lora_a: tuple[Tensor, ...]
    lora_b: tuple[Tensor, ...]
    gate: Tensor
    scale: tuple[float, ...]
    grad: Tensor
    trainable: tuple[bool, ...]
    dropout: float = 0.0
    per_expert: bool = False
    seed: Tensor = field(default_factory=lambda: torch.tensor(0))

    def to(self, dtype: torch.dtype) -> LoraInputs:
        return replace(
            self,
            x=self.x.to(dtype),
            lora_a=tuple(a.to(dtype) for a in self.lora_a),
            lora_b=tuple(b.to(dtype) for b in self.lora_b),
            gate=self.gate.to(dtype),
            grad=self.grad.to(dtype),
        )

    def call(self, base: Tensor | None = None, *, every_column: bool = True) -> LoraCall:
        """The call of a kernel with these inputs."""
        return LoraCall(
            self.x, base, list(self.lora_a), list(self.lora_b), self.gate.reshape(-1, len(self.scale)),
            list(self.scale), self.dropout, self.per_expert, self.seed if self.dropout > 0.0 else None, every_column,
        )  # fmt: skip


def make_inputs(workload: Workload, dtype: torch.dtype = torch.float32, seed: int = 0) -> LoraInputs:
    """Random inputs of a workload, drawn in float64 and rounded to dtype once: the same numbers for every backend."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    experts = len(workload.ranks)
    x = draw(*workload.leading, workload.in_features)
    if not workload.contiguous:
        x = draw(*workload.leading, 2 * workload.in_features).to(dtype)[..., ::2]
    gate_leading = workload.leading if workload.gate == "token" else workload.leading[:1]
    gate = draw(*gate_leading, experts) + 0.5
    if workload.pattern == "top2":
        gate = torch.zeros_like(gate).scatter(-1, gate.topk(2, dim=-1).indices, 1.0)
    elif workload.pattern == "one_expert":
        gate = torch.zeros_like(gate).index_fill(-1, torch.tensor([1]), 1.0)
    elif workload.pattern == "last_unused":
        gate[..., -1] = 0.0
    elif workload.pattern == "zero_and_negative":
        gate[::2] = 0.0
        gate[1::2] = -gate[1::2].abs()
    return LoraInputs(
        x=x.to(dtype),
        lora_a=tuple(
            (draw(rank, workload.in_features) / workload.in_features**0.5).to(dtype) for rank in workload.ranks
        ),
        lora_b=tuple(draw(workload.out_features, rank).to(dtype) for rank in workload.ranks),
        gate=gate.to(dtype),
        # Different for every expert, so that tests detect exchanged scales.
        scale=tuple(2.0 / (1 + e) for e in range(experts)),
        grad=draw(*workload.leading, workload.out_features).to(dtype),
        trainable=tuple(e not in workload.frozen for e in range(experts)),
        dropout=workload.dropout,
        per_expert=workload.per_expert,
        seed=torch.tensor(seed * 2**33 + 2025),
    )
