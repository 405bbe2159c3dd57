# SPDX-License-Identifier: Apache-2.0
"""The cases of the multi-LoRA suite: each varies one axis of a main case and has the baselines that matter for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch

import torch

from benchmarks.benchmark import Benchmark
from benchmarks.lora_benchmark import lora_benchmark
from benchmarks.lora_case import Direction, LoraCase
from benchmarks.lora_providers import cpu_backends

MIXED_RANKS = (4,) * 4 + (8,) * 7 + (16,) * 4 + (64,)  # 16 experts, 200 columns
MAIN = LoraCase(name="main", samples=16, tokens=128, in_features=2048, out_features=2048, ranks=MIXED_RANKS)
LOOPS = ("packed_compiled", "peft_mixed", "peft_loop", "dmole_loop", "grouped_mm")
HONEST = ("base_only", "packed_eager")
WIDTHS = ((1024, 1024), (1024, 4096), (2048, 2048), (4096, 4096), (4096, 11008), (11008, 4096))
# (samples, tokens, in, out) of the mini model's linears in training.
MINI_SHAPES = ((16, 25, 192, 192), (16, 25, 192, 768), (16, 50, 256, 1024), (16, 50, 1024, 256))


@dataclass(frozen=True, kw_only=True)
class Entry:
    case: LoraCase
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    directions: tuple[Direction, ...] = ("forward_backward",)
    threads: tuple[int, ...] = (1,)
    baselines: tuple[str, ...] = HONEST


def entries() -> list[Entry]:
    every = HONEST + LOOPS
    both: tuple[Direction, ...] = ("forward", "forward_backward")
    made = [Entry(case=MAIN, directions=both, threads=(1, 2), baselines=(*every, "cpu_pytorch_base"))]

    def vary(name: str, **changes: object) -> LoraCase:
        return replace(MAIN, name=name, **changes)  # type: ignore[arg-type]

    loops = (*HONEST, "peft_loop", "grouped_mm")
    for samples, tokens in ((1, 64), (4, 128), (32, 128), (64, 256)):
        case = vary(f"rows_{samples * tokens}", samples=samples, tokens=tokens, in_features=1024, out_features=1024)
        made.append(Entry(case=case, threads=(1, 2), baselines=loops))
    for d, p in WIDTHS:
        made.append(Entry(case=vary(f"width_{d}_{p}", samples=8, tokens=64, in_features=d, out_features=p)))
    for experts in (1, 4, 16, 64, 256):
        case = vary(f"experts_{experts}", ranks=(8,) * experts, top=min(2, experts))
        made.append(Entry(case=case, baselines=loops))
    for top, name in ((1, "top_1"), (0, "dense")):
        made.append(Entry(case=vary(name, top=top), baselines=every if top == 1 else loops, directions=both))
    for top, name in ((1, "token_top_1"), (2, "token_top_2")):
        made.append(Entry(case=vary(name, top=top, level="token"), baselines=loops))
    for popularity in ("zipf", "one_hot"):
        made.append(Entry(case=vary(f"popularity_{popularity}", popularity=popularity), baselines=loops))
    made.append(Entry(case=vary("dropout", dropout=0.05)))
    for rows in (1, 4, 16, 64):
        for width in (2048, 4096):
            case = vary(f"decode_{rows}_{width}", samples=rows, tokens=1, in_features=width, out_features=width)
            made.append(
                Entry(
                    case=case,
                    directions=("forward",),
                    threads=(1, 2),
                    baselines=(*HONEST, "grouped_mm", "cpu_pytorch_base"),
                )
            )
    for samples, tokens, d, p in MINI_SHAPES:
        for ranks in ((16,), (16, 16)):
            case = LoraCase(
                name=f"mini_{samples * tokens}_{d}_{p}_{len(ranks)}", samples=samples, tokens=tokens, in_features=d,
                out_features=p, ranks=ranks, top=len(ranks), popularity="one_hot", trainable="last",
            )  # fmt: skip
            made.append(Entry(case=case, directions=both))
    return made


def benchmarks(only: str = "*") -> Iterator[Benchmark]:
    """Made one at a time, so that the tensors of one case can be freed before the next is made."""
    for entry in (entry for entry in entries() if fnmatch(entry.case.name, only)):
        for dtype in entry.dtypes:
            for direction in entry.directions:
                for threads in entry.threads:
                    providers = (*entry.baselines, *cpu_backends())
                    yield lora_benchmark(entry.case, dtype, direction, threads, providers)
