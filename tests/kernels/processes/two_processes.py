# SPDX-License-Identifier: Apache-2.0
"""What each of two gloo processes does in test_two_processes.py; its results go to a file per process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dmole_kernels import ExpertHandle, convert, experts_of, save_experts

NAMES = ["a", "b"]
# [samples of both processes, experts]: the first two samples are process 0's.
GATES = {
    "same": torch.tensor([[1.0, 0.0], [1.0, 0.5], [1.0, 0.0], [0.5, 1.0]]),
    "different": torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]),
}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


def with_experts(base: nn.Module) -> ExpertHandle:
    experts = convert(base)
    torch.manual_seed(1)
    for name in NAMES:
        experts.add(name, rank=2, alpha=4.0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts


def samples() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(2))


def gradients(experts: ExpertHandle) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in experts.parameters()]


def one_process(kind: str) -> list[Tensor]:
    """The mean loss over both processes' samples, as DDP averages it."""
    base = model()
    experts = with_experts(base)
    with experts.use(GATES[kind], NAMES):
        base(samples()).square().mean().backward()
    return gradients(experts)


def ddp(kind: str, rank: int) -> list[Tensor]:
    base = model()
    experts = with_experts(base)
    wrapped = DistributedDataParallel(base, find_unused_parameters=True)
    mine = slice(2 * rank, 2 * rank + 2)
    with experts.use(GATES[kind][mine], NAMES):
        wrapped(samples()[mine]).square().mean().backward()
    return gradients(experts)


def sharded(kind: str, rank: int, folder: Path) -> list[Tensor]:
    base = model()
    experts = with_experts(base)
    ignored = set(experts.parameters())
    for layer in (base[0], base[2]):
        fully_shard(layer, ignored_params=ignored)
    fully_shard(base, ignored_params=ignored)
    assert type(base[0].base.weight) is DTensor and type(experts.parameters()[0]) is nn.Parameter
    mine = slice(2 * rank, 2 * rank + 2)
    with experts.use(GATES[kind][mine], NAMES):
        base(samples()[mine]).square().mean().backward()
    experts.reduce_gradients()
    found = gradients(experts)
    experts_of(base).add("later", rank=1, alpha=1.0)
    assert all(type(p) is nn.Parameter and p.device.type == "cpu" for p in experts.parameters("later"))
    if rank == 0:
        save_experts(experts, folder / "experts", names=NAMES)
    return found


def sharded_experts(rank: int, *, allowed: bool) -> Any:
    """Experts left to fully_shard: the error, or with the check taken out the gradients that it prevents."""
    base = model()
    experts = with_experts(base)
    for layer in (base[0], base[2]):
        fully_shard(layer)
    fully_shard(base)
    mine = slice(2 * rank, 2 * rank + 2)
    if allowed:
        experts.gates._refuse_sharded = lambda names: None  # type: ignore[method-assign]
    try:
        with experts.use(GATES["different"][mine], NAMES):
            base(samples()[mine]).square().mean().backward()
    except ValueError as error:
        return str(error)
    return [
        torch.zeros(p.shape) if p.grad is None else p.grad.full_tensor()  # type: ignore[attr-defined]
        for p in experts.parameters()
    ]


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results: dict[str, Any] = {f"ddp_{kind}": ddp(kind, rank) for kind in GATES}
    results |= {f"sharded_{kind}": sharded(kind, rank, folder) for kind in GATES}
    results["refused"] = sharded_experts(rank, allowed=False)
    results["unchecked"] = sharded_experts(rank, allowed=True)
    torch.save(results, folder / f"results_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
