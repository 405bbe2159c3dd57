# SPDX-License-Identifier: Apache-2.0
"""Launches of representative calls without data, for counting and for ahead-of-time compilation.

Tensors live on PyTorch's meta device: no memory, and addresses and sizes with the divisibility of real ones (PyTorch
allocates at multiples of 512 bytes on a GPU).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dmole_kernels.triton_backend.grad_norm import (
    accumulate_gradient,
    accumulate_sketch,
    squared_norm_direct,
    squared_norm_ghost,
)
from dmole_kernels.triton_backend.launch import Launch
from dmole_kernels.triton_backend.multi_lora import multi_lora_backward, multi_lora_forward
from dmole_kernels.triton_backend.router_score import masked_max_pool, router_score_forward


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layer's call: N tokens, D in, P out."""

    name: str
    ranks: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    expert_dtype: torch.dtype = torch.float32
    rows: int = 4096
    in_features: int = 4096
    out_features: int = 4096
    samples: int = 8
    gate: Literal["sample", "token"] = "sample"
    dropout: float = 0.0
    device_seed: bool = False
    per_expert: bool = False
    need_gate: bool = False
    every_column: bool = False
    frozen: tuple[int, ...] = ()


# Every configuration (kernel, element size, column block) and every switch of the kernels, over all targets.
CASES = (
    Case(name="rank 16", ranks=(16,)),
    Case(name="ranks 8 16 8, experts in bf16, dropout, seed on the device, gates", ranks=(8, 16, 8),
         expert_dtype=torch.bfloat16, dropout=0.05, device_seed=True, need_gate=True, every_column=True),
    Case(name="4 x 16", ranks=(16,) * 4),
    Case(name="9 x 16, token gates, dropout", ranks=(16,) * 9, gate="token", dropout=0.05, need_gate=True,
         every_column=True),
    Case(name="ranks 3 64 17, mask per expert", ranks=(3, 64, 17), dropout=0.05, per_expert=True),
    Case(name="4 x 16, float16", ranks=(16,) * 4, dtype=torch.float16, expert_dtype=torch.float16),
    Case(name="4 x 16, float32", ranks=(16,) * 4, dtype=torch.float32),
    Case(name="9 x 16, float32, dropout", ranks=(16,) * 9, dtype=torch.float32, dropout=0.05),
)  # fmt: skip


def launches(case: Case, target: str) -> tuple[list[Launch], list[Launch]]:
    """The launches of forward and of backward, in order."""

    def empty(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, y = empty(case.rows, case.in_features), empty(case.rows, case.out_features)
    experts = len(case.ranks)
    lora_a = [empty(rank, case.in_features, dtype=case.expert_dtype) for rank in case.ranks]
    lora_b = [empty(case.out_features, rank, dtype=case.expert_dtype) for rank in case.ranks]
    gate = empty(case.rows if case.gate == "token" else case.samples, experts, dtype=torch.float32)
    seed = torch.tensor(2025, device="meta" if case.device_seed else "cpu") if case.dropout else None
    switches = (lora_a, lora_b, gate, [1.0] * experts, case.dropout, case.per_expert, seed)
    forward: list[Launch] = []
    backward: list[Launch] = []
    _, shrunk = multi_lora_forward(
        x, y, *switches, every_column=case.every_column, target=target, runner=forward.append
    )
    trainable = [e not in case.frozen for e in range(experts)]
    multi_lora_backward(
        y, x, shrunk, *switches, True, case.need_gate, trainable, target=target, runner=backward.append
    )  # fmt: skip
    return forward, backward


def other_launches(target: str) -> list[tuple[str, Launch]]:
    """Norms, sketch, router and pooling, at the sizes of a 2B model's layers."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    found: list[Launch] = []
    x, grad = empty(8, 512, 2048), empty(8, 512, 2048)
    squared_norm_direct(x, grad, target=target, runner=found.append)
    squared_norm_ghost(x, grad, target=target, runner=found.append)
    rows, row_grads = empty(4096, 2048, dtype=torch.bfloat16), empty(4096, 2048, dtype=torch.bfloat16)
    accumulate_gradient(empty(2048, 2048), rows, row_grads, target=target, runner=found.append)
    accumulate_sketch(
        empty(64, 64), rows, row_grads, empty(2048, 64), empty(2048, 64), target=target, runner=found.append
    )  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        router_score_forward(
            empty(8, 2048, dtype=dtype), empty(9, 128, 2048, dtype=dtype), empty(9, 128, dtype=dtype),
            empty(9, 2048, 128, dtype=dtype), empty(9, 2048, dtype=dtype), True, target=target, runner=found.append,
        )  # fmt: skip
        masked_max_pool(empty(8, 512, 2048, dtype=dtype), empty(8, 512, dtype=torch.bool), target=target,
                        runner=found.append)  # fmt: skip
    return [("norms and router", launch) for launch in found]
