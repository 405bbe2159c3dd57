# SPDX-License-Identifier: Apache-2.0
"""Launches of representative calls, for counting and ahead-of-time compilation, and on a GPU for the tuner.

Without a device the tensors are on PyTorch's meta device: no memory, and addresses and sizes with the divisibility of
real ones (PyTorch allocates at multiples of 512 bytes on a GPU). Building launches there also shows that it reads no
value from the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dmole_kernels._lora_call import LoraCall, Wanted
from dmole_kernels.triton_backend.configs import Target
from dmole_kernels.triton_backend.fused_base import fused_base_forward
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


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the norms', the sketch's and the router's launches: by default a 2B model's layers and nine tasks."""

    samples: int = 8
    tokens: int = 512
    width: int = 2048
    sketch: int = 64
    tasks: int = 9
    hidden: int = 128


MODEL = Sizes()


def _drawn(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return (
        torch.empty(shape, dtype=dtype, device=device)
        if device == "meta"
        else torch.randn(*shape, device=device).to(dtype)
    )


Switches = tuple[list[Tensor], list[Tensor], Tensor, list[float], float, bool, Tensor | None]
Arguments = tuple[Tensor, Tensor, Switches]


def launches(case: Case, target: Target, tensors: Arguments | None = None) -> tuple[list[Launch], list[Launch]]:
    """The launches of forward and of backward, in order; not run."""
    forward: list[Launch] = []
    backward: list[Launch] = []
    x, y, switches = call_arguments(case) if tensors is None else tensors
    _, shrunk = multi_lora_forward(
        LoraCall(x, y, *switches, every_column=case.every_column), target=target, runner=forward.append
    )
    trainable = [e not in case.frozen for e in range(len(case.ranks))]
    multi_lora_backward(
        LoraCall(x, None, *switches),
        y,
        shrunk,
        Wanted(True, case.need_gate, trainable),
        target=target,
        runner=backward.append,
    )
    return forward, backward


def fused_launches(case: Case, target: Target, tensors: Arguments | None = None) -> list[Launch]:
    """The launches of the fused forward."""
    found: list[Launch] = []
    x, y, switches = call_arguments(case) if tensors is None else tensors
    weight = _drawn(y.shape[1], x.shape[1], dtype=x.dtype, device=x.device.type)
    fused_base_forward(
        LoraCall(x, None, *switches, case.every_column), weight, None, target=target, runner=found.append
    )
    return found


def call_arguments(case: Case, device: str = "meta") -> Arguments:
    """x, y and the rest; every gate is on."""
    x = _drawn(case.rows, case.in_features, dtype=case.dtype, device=device)
    y = _drawn(case.rows, case.out_features, dtype=case.dtype, device=device)
    lora_a = [_drawn(rank, case.in_features, dtype=case.expert_dtype, device=device) for rank in case.ranks]
    lora_b = [_drawn(case.out_features, rank, dtype=case.expert_dtype, device=device) for rank in case.ranks]
    gates = case.rows if case.gate == "token" else case.samples
    gate = torch.ones(gates, len(case.ranks), device=device)
    seed = torch.tensor(2025, device=device if case.device_seed else "cpu") if case.dropout else None
    return x, y, (lora_a, lora_b, gate, [1.0] * len(case.ranks), case.dropout, case.per_expert, seed)


def other_launches(target: Target, *, sizes: Sizes = MODEL, device: str = "meta") -> list[tuple[str, Launch]]:
    """Norms, sketch, router and pooling."""

    def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return _drawn(*shape, dtype=dtype, device=device)

    found: list[Launch] = []
    width = sizes.width
    x, grad = (drawn(sizes.samples, sizes.tokens, width) for _ in range(2))
    squared_norm_direct(x, grad, target=target, runner=found.append)
    squared_norm_ghost(x, grad, target=target, runner=found.append)
    rows, row_grads = (drawn(sizes.samples * sizes.tokens, width, dtype=torch.bfloat16) for _ in range(2))
    accumulate_gradient(drawn(width, width), rows, row_grads, target=target, runner=found.append)
    accumulate_sketch(
        drawn(sizes.sketch, sizes.sketch), rows, row_grads, drawn(width, sizes.sketch), drawn(width, sizes.sketch),
        target=target, runner=found.append,
    )  # fmt: skip
    tasks, hidden = sizes.tasks, sizes.hidden
    for dtype in (torch.float32, torch.bfloat16):
        router_score_forward(
            drawn(sizes.samples, width, dtype=dtype), drawn(tasks, hidden, width, dtype=dtype),
            drawn(tasks, hidden, dtype=dtype), drawn(tasks, width, hidden, dtype=dtype),
            drawn(tasks, width, dtype=dtype), True, target=target, runner=found.append,
        )  # fmt: skip
        mask = torch.ones(sizes.samples, sizes.tokens, dtype=torch.bool, device=device)
        masked_max_pool(
            drawn(sizes.samples, sizes.tokens, width, dtype=dtype), mask, target=target, runner=found.append
        )  # fmt: skip
    return [("norms and router", launch) for launch in found]


def every_launch(target: Target) -> list[tuple[str, Launch]]:
    """All launches of all cases with the cases' names: what check-aot compiles."""
    calls = [(case.name, launch) for case in CASES for direction in launches(case, target) for launch in direction]
    calls += [(case.name, launch) for case in CASES for launch in fused_launches(case, target)]
    return calls + other_launches(target)
