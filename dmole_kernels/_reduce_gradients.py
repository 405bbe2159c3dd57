# SPDX-License-Identifier: Apache-2.0
"""
    grad  <-  1 / P sum_p grad_p        over the P processes of a group; a process without a gradient counts as zero
    grad  <-  sum_p grad_p              with reduction="sum"

Gradients of experts that are on every process, of which each process may have used others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, distributed

# Gradients travel in flat tensors of at most this many elements (and at least one gradient).
BUCKET = 2**24
_COMPARED = 8  # elements of A that are compared between the processes


def reduce_gradients(
    parameters: Mapping[str, Tensor],
    group: distributed.ProcessGroup | None = None,
    *,
    reduction: Literal["mean", "sum"] = "mean",
) -> None:
    """grad <- 1 / P sum_p grad_p, over the P processes of `group`, in place. With `reduction="sum"`: without 1 / P.

    `ExpertHandle.reduce_gradients` calls this for all trainable experts of a model. A process without a gradient
    counts as zero, and a parameter that no process has a gradient for keeps none, as in one process. Small collectives
    compare the processes' parameters first; gradients then travel in flat tensors.

    Args:
        parameters: Parameters that every process holds as a whole, by names that end in the expert's and `lora_a` or
            `lora_b` ("layer/expert/lora_a", or as in the model's `state_dict`); the same ones in the same order on
            every process.
        group: the processes; None is all.

    Raises:
        ValueError: without a process group; for another `reduction`; on every process when the parameters differ in
            names, shapes, dtypes or values.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: got {reduction!r}; expected 'mean' or 'sum'. Choose one of them.")
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError(
            "reduce_gradients: no process group is initialised; expected several processes. Call "
            "torch.distributed.init_process_group first, or leave reduce_gradients out in a single process."
        )
    _check_same(parameters, group)
    if not parameters:
        return
    found = torch.tensor([p.grad is not None for p in parameters.values()], dtype=torch.int32)
    found = found.to(next(iter(parameters.values())).device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX, group)
    # What no process used keeps no gradient, as in one process: a zero would let an optimizer's momentum move it.
    used = [p for p, some in zip(parameters.values(), found.tolist(), strict=True) if some]
    processes = distributed.get_world_size(group)
    for bucket in _buckets(used):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        distributed.all_reduce(flat, distributed.ReduceOp.SUM, group)
        if reduction == "mean":
            flat /= processes
        parts = torch.split(flat, [p.numel() for p in bucket])
        for parameter, gradient, part in zip(bucket, gradients, parts, strict=True):
            parameter.grad = gradient.copy_(part.view_as(gradient))


def _buckets(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of Parameters on one device, of one dtype, of at most BUCKET elements."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    for same in kinds.values():
        bucket: list[Tensor] = []
        size = 0
        for parameter in same:
            if bucket and size + parameter.numel() > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(parameter)
            size += parameter.numel()
        yield bucket


def _check_same(parameters: Mapping[str, Tensor], group: distributed.ProcessGroup | None) -> None:
    """Raises ValueError on every process unless all have the same experts, which started from the same values."""
    layout = repr([(name, tuple(p.shape), str(p.dtype)) for name, p in parameters.items()])
    # 52 bits: exact in float64, in which the values are compared too.
    digest = int.from_bytes(hashlib.sha256(layout.encode()).digest()[:8], "big") >> 12
    device = next((p.device for p in parameters.values()), torch.device(_device_of(group)))
    first = torch.tensor([digest, -digest], dtype=torch.int64, device=device)
    distributed.all_reduce(first, distributed.ReduceOp.MAX, group)
    highest, lowest = first.tolist()
    if highest != -lowest:
        raise ValueError(
            "reduce_gradients: the processes have different trainable experts (names, layers, ranks or what is "
            "frozen); expected the same on all. Call add, remove, freeze and unfreeze on every process, in one order."
        )
    if not parameters:
        return
    # One A of each expert: enough to see that add() drew other numbers on another process.
    one = {_expert_of(name): p for name, p in parameters.items() if name.endswith("lora_a")}
    if not one:
        return
    values = torch.cat([p.detach().reshape(-1)[:_COMPARED].to(device, torch.float64) for p in one.values()])
    values = values.nan_to_num(0.0, 0.0, 0.0)
    both = torch.cat([values, -values])
    distributed.all_reduce(both, distributed.ReduceOp.MAX, group)
    high, low = both.chunk(2)
    if bool((high + low > 1e-2 * torch.maximum(high.abs(), low.abs()) + 1e-6).any()):
        raise ValueError(
            "reduce_gradients: the experts have other values on another process; expected the same start on all. Pass "
            "add(..., generator=torch.Generator().manual_seed(0)) on every process, or load_experts the same folder."
        )


def _expert_of(name: str) -> str:
    return name.rsplit("/" if "/" in name else ".", 2)[-2]


def _device_of(group: distributed.ProcessGroup | None) -> str:
    return "cuda" if distributed.get_backend(group) == "nccl" else "cpu"
