# SPDX-License-Identifier: Apache-2.0
"""Work that several processes share: who computes what, and how everyone gets the whole.

    item i of n  is computed by process  i mod P;   shared(n, compute) = [compute(0), ..., compute(n - 1)] everywhere

Processes are those of torch.distributed (torchrun, accelerate launch); without it there is one. A base whose weights
`shard` has spread over the processes needs all of them in every forward pass, so each process computes as many items.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from dmole.config_error import ConfigError

T = TypeVar("T")


def process() -> tuple[int, int]:
    """(number of this process, how many there are)."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def shared(count: int, compute: Callable[[int], T]) -> list[T]:
    """`compute(i)` for i = 0 .. count - 1, each by one process, all of them in every process; results are pickled.

    Every process calls `compute` as often: one without an item of its own repeats the last one and throws it away.
    """
    number, processes = process()
    if processes == 1 or count == 0:
        return [compute(place) for place in range(count)]
    rounds = math.ceil(count / processes)
    own = [compute(min(place, count - 1)) for place in range(number, rounds * processes, processes)]
    by_process: list[T] = gather_object(own)
    return [by_process[(place % processes) * rounds + place // processes] for place in range(count)]


def gathered(own: list[T]) -> list[T]:
    """The lists of all processes, one after another."""
    if process()[1] == 1:
        return own
    found: list[T] = gather_object(own)
    return found


def leave() -> None:
    """End the process group at the end of a program, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def shard(model: nn.Module, device_type: str) -> None:
    """Spread the weights of every layer over the processes with torch's `fully_shard`; call before experts are added.

    Experts that are added later are plain parameters in every process, and their gradients are summed by the loop:
    sharded ones would be reduced by position, which mixes up the gradients of processes that use different experts.
    Each layer is its own root, because towers are also called by themselves, and gives the others' parts back after
    each forward pass. Embeddings and head stay whole.

    Raises ConfigError for one process, and for a model without layers of transformers' `GradientCheckpointingLayer`.
    """
    if process()[1] == 1:
        raise ConfigError(
            "training.fsdp is True in one process; expected several. Launch with torchrun, or leave it out."
        )
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"training.fsdp is True and {type(model).__name__} has no layers that could be sharded; expected false."
        )
    mesh = init_device_mesh(device_type, (process()[1],))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has spread some of the model's weights over processes."""
    # By the modules: between forward and backward FSDP2 shows plain tensors.
    return any(isinstance(module, FSDPModule) for module in model.modules())
