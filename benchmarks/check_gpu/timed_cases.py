# SPDX-License-Identifier: Apache-2.0
"""The cases that are timed on a GPU with all baselines: training at two widths, many experts a token, decoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.benchmark import Benchmark
from benchmarks.lora_benchmark import lora_benchmark
from benchmarks.lora_case import Direction, LoraCase
from benchmarks.machine import Machine, this_machine
from dmole_kernels import BACKENDS
from dmole_kernels._tune import INTERPRETER

BASELINES = ("base_only", "packed_eager", "peft_loop", "dmole_loop", "grouped_mm")
OURS = ("triton", "triton_fused")
MAIN = LoraCase(name="main", samples=8, tokens=512, in_features=4096, out_features=4096, ranks=(16,) * 4)


@dataclass(frozen=True, kw_only=True)
class Entry:
    case: LoraCase
    directions: tuple[Direction, ...]
    providers: tuple[str, ...] = BASELINES + OURS


def entries(*, gpu: bool) -> list[Entry]:
    """The most important first, since time may run out."""
    both: tuple[Direction, ...] = ("forward_backward", "forward")
    if not gpu:
        tiny = replace(MAIN, name="tiny", samples=2, tokens=3, in_features=32, out_features=32, ranks=(2, 4, 8))
        return [Entry(case=tiny, directions=both)]
    decode = replace(MAIN, name="decode_16", samples=16, tokens=1)
    decoding = BASELINES + OURS + (("cuda",) if "cuda" in BACKENDS else ())
    mlp = replace(MAIN, name="wide_2048_8192", in_features=2048, out_features=8192, ranks=(16,) * 9)
    tokens = replace(MAIN, name="64_experts_token_gates", ranks=(8,) * 64, level="token")
    return [
        Entry(case=MAIN, directions=both),
        Entry(case=decode, directions=("forward",), providers=decoding),
        Entry(case=mlp, directions=both),
        Entry(case=tokens, directions=("forward_backward",)),
        Entry(case=replace(MAIN, name="dropout", dropout=0.05), directions=("forward_backward",)),
    ]


def benchmarks(*, gpu: bool) -> Iterator[Benchmark]:
    """Made one at a time, in bfloat16 (float32 in the interpreter, whose bfloat16 products are emulated)."""
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    for entry in entries(gpu=gpu):
        for direction in entry.directions:
            yield lora_benchmark(entry.case, dtype, direction, torch.get_num_threads(), entry.providers, device=device)


def machine(*, gpu: bool) -> Machine:
    """This machine, with the shapes on which its peak and bandwidth are measured."""
    here = this_machine()
    if not gpu:
        return replace(here, name=f"{INTERPRETER}; {here.name}", shapes=((128, 128, 128),), copy_bytes=2**20)
    name = torch.cuda.get_device_name()
    sides = (4096, 8192)
    return replace(here, name=name, shapes=tuple((n, n, n) for n in sides), copy_bytes=2**30, device="cuda")
