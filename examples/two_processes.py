# SPDX-License-Identifier: Apache-2.0
"""A base sharded over processes (FSDP2), experts on every one of them, each process with its own expert. No downloads.

    torchrun --standalone --nproc-per-node 2 examples/two_processes.py

Process 0 has rows that count up, process 1 rows that count down. Experts stay out of the sharding, and
`reduce_gradients` averages their gradients; a process that did not use an expert counts as zero.
"""

import os
import sys

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from dmole_kernels import convert

distributed.init_process_group("gloo")  # "nccl", and a device of its own for each process, on GPUs
rank, processes = distributed.get_rank(), distributed.get_world_size()
torch.set_num_threads(1)
torch.manual_seed(0)  # the same base and the same experts on every process
config = LlamaConfig(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.1,
)
model = LlamaForCausalLM(config)
experts = convert(model)
names = ["up", "down"]
for name in names:
    experts.add(name, rank=8)

mesh = distributed.init_device_mesh("cpu", (processes,))
whole = set(experts.parameters())
for block in model.model.layers:
    fully_shard(block, mesh=mesh, ignored_params=whole)
fully_shard(model, mesh=mesh, ignored_params=whole)

own = names[rank % 2]
step_of_sample = 1 if own == "up" else -1
optimizer = torch.optim.AdamW(experts.parameters(), lr=1e-2)
torch.manual_seed(rank)  # from here on every process draws data of its own
for _ in range(40):
    numbers = (torch.randint(0, 32, (16, 1)) + step_of_sample * torch.arange(6)) % 32
    with experts.use(torch.ones(16, 1), [own]):
        loss = model(input_ids=numbers, labels=numbers).loss
        loss.backward()
    experts.reduce_gradients()
    optimizer.step()
    optimizer.zero_grad()

model.eval()
start = torch.tensor([[10, 10 + step_of_sample]])
with torch.no_grad(), experts.use(torch.eye(2)[[rank % 2]], names):
    following = int(model(input_ids=start).logits[0, -1].argmax())
found: list = [None] * processes
distributed.all_gather_object(found, (own, [*start[0].tolist(), following]))
if rank == 0:
    print("each process with its own expert:", dict(found))
distributed.destroy_process_group()
# FSDP2 keeps gloo's threads alive beyond that (torch 2.13), and one that frees a tensor while Python shuts down aborts.
sys.stdout.flush()
os._exit(0)
