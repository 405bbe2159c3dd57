# SPDX-License-Identifier: Apache-2.0
"""One of two gloo processes: runs every case of test_two_processes.py and saves what it saw.

python two_processes.py RANK STORE FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dmole_kernels import ExpertBank, ExpertHandle, convert, load_experts, reduce_gradients, save_experts

NAMES = ["a", "b", "c"]
SAMPLES = 8
# Gates of the global batch: process 0 has the first half of the samples.
GATES = {
    "same": torch.tensor([[1.0, 0.0, 0.0], [0.5, 2.0, 0.0]] * 4),
    "different": torch.tensor([[1.0, 0.0, 0.0]] * 4 + [[0.0, 1.0, 0.0]] * 4),
}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.tanh(self.v_proj(torch.tanh(self.q_proj(x)))))  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self, width: int = 16, checkpointed: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x.square().mean()


def build(checkpointed: bool = False) -> tuple[Net, ExpertHandle]:
    torch.manual_seed(0)
    model = Net(checkpointed=checkpointed)
    experts = convert(model, ["q_proj", "v_proj"])
    for i, name in enumerate(NAMES):
        experts.add(name, rank=2 + i)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.3)
    return model, experts


def shard(model: nn.Module, ignored: Sequence[nn.Parameter]) -> None:
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, ignored_params=set(ignored))
    fully_shard(model, ignored_params=set(ignored))


def steps(
    run: nn.Module, experts: ExpertHandle, gate: Tensor, rows: slice, reduce: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Gradients of the first step, and the experts after three."""
    x = torch.randn(3, SAMPLES, 5, 16, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(experts.parameters(), lr=0.5, momentum=0.9)
    first: dict[str, Tensor | None] = {}
    for step in range(3):
        optimizer.zero_grad()
        with experts.use(gate[rows], NAMES):
            run(x[step, rows]).backward()
        reduce()
        if step == 0:
            first = {k: None if p.grad is None else p.grad.clone() for k, p in named(experts).items()}
        optimizer.step()
    return {"gradients": first, "experts": {k: p.detach().clone() for k, p in named(experts).items()}}


def named(experts: ExpertHandle) -> dict[str, nn.Parameter]:
    return {
        f"{place}.{name}.{side}": parameter
        for place, layer in experts.layers.items()
        for name in layer.bank.names
        for side, parameter in layer.bank.expert(name).named_parameters()
    }


def message(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def ddp(rows: slice, kind: str, checkpointed: bool = False) -> dict[str, Any]:
    model, experts = build(checkpointed)
    return steps(DistributedDataParallel(model, find_unused_parameters=True), experts, GATES[kind], rows)


def fsdp(rows: slice, kind: str, checkpointed: bool = False) -> dict[str, Any]:
    model, experts = build(checkpointed)
    shard(model, experts.parameters())
    assert hasattr(model.blocks[0].q_proj.base.weight, "device_mesh")
    return steps(model, experts, GATES[kind], rows, experts.reduce_gradients)


def replicated(rows: slice, kind: str) -> dict[str, Any]:
    model, experts = build()
    return steps(model, experts, GATES[kind], rows, experts.reduce_gradients)


def accumulated(rows: slice, with_ddp: bool) -> dict[str, Any]:
    """Two micro-batches of two rows, reduced once."""
    model, experts = build()
    run = DistributedDataParallel(model, find_unused_parameters=True) if with_ddp else model
    x = torch.randn(3, SAMPLES, 5, 16, generator=torch.Generator().manual_seed(1))[0]
    for part in (slice(rows.start, rows.start + 2), slice(rows.start + 2, rows.stop)):
        last = part.stop == rows.stop
        with experts.use(GATES["different"][part], NAMES), run.no_sync() if with_ddp and not last else nullcontext():
            (run(x[part]) / 2).backward()
    if not with_ddp:
        experts.reduce_gradients()
    return {"gradients": {k: None if p.grad is None else p.grad.clone() for k, p in named(experts).items()}}


def reduced(rank: int, reduction: Any) -> list[float | None]:
    """Parameter i has a gradient in process i alone, the third one in none."""
    parameters = {f"layer.experts.{name}.lora_a": nn.Parameter(torch.zeros(2)) for name in NAMES}
    list(parameters.values())[rank].grad = torch.full((2,), 0.5 if rank == 0 else 50.0)
    reduce_gradients(parameters, reduction=reduction)
    return [None if p.grad is None else float(p.grad[0]) for p in parameters.values()]


def sharded_experts(rank: int) -> dict[str, Any]:
    """fully_shard without ignored_params: what is refused, and what would happen."""
    model, experts = build()
    gate = torch.ones(1, 1)
    with experts.use(gate, ["a"]):
        model(torch.ones(1, 16))
    shard(model, [])
    seen = {"use": message(lambda: experts.use(gate, ["a"]))}
    model(torch.ones(1, 16))  # the root's parameters are plain tensors from here to the next backward
    seen["use_after_forward"] = message(lambda: experts.use(gate, ["a"]))
    layer = model.blocks[0].q_proj
    seen["explicit"] = message(lambda: layer(torch.ones(1, 16), gate, ["a"]))
    seen["reduce"] = message(experts.reduce_gradients)

    linear = nn.Sequential(nn.Linear(2, 2))
    small = convert(linear)
    for name in ("a", "b"):
        small.add(name, rank=2, alpha=2.0)
        expert = small.layers["0"].bank.expert(name)
        nn.init.constant_(expert.lora_a, 0.5)
        expert.lora_a.requires_grad_(False)
    whole = [p for p in linear.parameters() if not p.requires_grad]
    fully_shard(linear, ignored_params=set(whole))
    bank = small.layers["0"].bank
    seen["partly"] = message(lambda: small.use(gate, ["a"]))
    for name in ("a", "b"):
        del bank.expert(name).__dict__["sharded"]  # as if nothing had noticed
    ExpertBank.changes += 1
    with small.use(gate, ["ab"[rank]]):
        (linear(torch.ones(1, 2)).sum() * (1.0, 100.0)[rank]).backward()
    seen["silent"] = bank.expert("ab"[rank]).lora_b.grad.to_local().unique().tolist()  # this process's half
    return seen


def files(rank: int, folder: Path) -> dict[str, Any]:
    """save_experts, load_experts in place, add and state_dict of a model whose base is sharded."""
    model, experts = build()
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    shard(model, experts.parameters())
    if rank == 0:
        save_experts(model, folder / "experts")
    distributed.barrier()
    before = {key: parameter.detach().clone() for key, parameter in named(experts).items()}
    parameters = experts.parameters()
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    load_experts(model, folder / "experts")
    seen: dict[str, Any] = {
        "in_place": all(one is two for one, two in zip(parameters, experts.parameters(), strict=True)),
        "loaded": all(torch.equal(before[key], parameter) for key, parameter in named(experts).items()),
    }
    experts.add("d", rank=3, generator=torch.Generator().manual_seed(3))
    load_experts(model, [folder / "experts" / "a"], ["e"], trainable=True)
    added = [*experts.parameters("d"), *experts.parameters("e")]
    seen["added"] = {(type(p), p.device.type, p.dtype) for p in added}
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(rank))
    with experts.use(torch.ones(1, 2), ["d", "e"]):
        model(x).backward()
    with experts.use(torch.ones(1, 2), ["d", "a"]):
        model(x).backward()
    experts.reduce_gradients()
    seen["gradients"] = torch.stack([p.grad.double().norm() for p in added if p.grad is not None])
    experts.remove("d")
    experts.remove("e")

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if rank == 0:
        seen["keys"] = list(state) == list(plain)
        seen["state"] = all(torch.equal(state[key], plain[key]) for key in plain)
    other = {key: value + 1 for key, value in plain.items()}
    set_model_state_dict(model, dict(other), options=options)  # it exchanges the values
    state = get_model_state_dict(model, options=options)
    if rank == 0:
        seen["set"] = all(torch.equal(state[key], other[key]) for key in plain)
    return seen


def mistakes(rank: int) -> dict[str, str]:
    model, experts = build()
    experts.add("drawn", rank=2, generator=torch.Generator().manual_seed(rank))
    seen = {"seeds": message(experts.reduce_gradients)}
    experts.remove("drawn")
    seen["equal"] = message(experts.reduce_gradients)
    if rank == 1:
        experts.freeze("b")
    seen["frozen"] = message(experts.reduce_gradients)
    return seen


def main(rank: int, store: str, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    rows = slice(4 * rank, 4 * rank + 4)
    seen: dict[str, Any] = {}
    for kind in GATES:
        seen[f"ddp-{kind}"] = ddp(rows, kind)
        seen[f"ddp_checkpointed-{kind}"] = ddp(rows, kind, checkpointed=True)
        seen[f"fsdp-{kind}"] = fsdp(rows, kind)
        seen[f"fsdp_checkpointed-{kind}"] = fsdp(rows, kind, checkpointed=True)
        seen[f"replicated-{kind}"] = replicated(rows, kind)
    for with_ddp in (False, True):
        seen[f"accumulated-{with_ddp}"] = accumulated(rows, with_ddp)
    seen["reduced"] = {reduction: reduced(rank, reduction) for reduction in ("mean", "sum")}
    seen["other"] = message(lambda: reduced(rank, "max"))
    seen["sharded_experts"] = sharded_experts(rank)
    seen["files"] = files(rank, folder)
    seen["mistakes"] = mistakes(rank)
    torch.save(seen, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
