# SPDX-License-Identifier: Apache-2.0
"""
    python -m pytest benchmarks/per_op.py --benchmark-group-by=group [--benchmark-autosave --benchmark-compare]

One pytest-benchmark report an op: every CPU backend on one shape of a real model and one of the mini model. For
comparing two commits of this package with each other; baselines, peaks and floors are in `benchmarks.run`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.benchmark import Benchmark
from benchmarks.grad_norm_suite import NormCase, accumulate_benchmark, norm_benchmark
from benchmarks.lora_benchmark import lora_benchmark
from benchmarks.lora_case import LoraCase
from benchmarks.lora_providers import cpu_backends
from benchmarks.lora_suite import MAIN
from benchmarks.router_suite import ScoreCase, pool_benchmark, score_benchmark, select_benchmark

MINI = LoraCase(
    name="mini", samples=16, tokens=50, in_features=256, out_features=1024, ranks=(16, 16), trainable="last",
    popularity="one_hot",
)  # fmt: skip
DECODE = replace(MAIN, name="decode", samples=16, tokens=1)
NORM = NormCase(samples=4, tokens=128, in_features=1024, out_features=1024)
MINI_NORM = NormCase(samples=8, tokens=50, in_features=256, out_features=1024)
SCORE = ScoreCase(tasks=9, samples=64, features=3072)

OPS: dict[str, Callable[[str], Benchmark]] = {
    "multi_lora bf16": lambda b: lora_benchmark(MAIN, torch.bfloat16, "forward_backward", 1, (b,)),
    "multi_lora fp32": lambda b: lora_benchmark(MAIN, torch.float32, "forward_backward", 1, (b,)),
    "multi_lora decode bf16": lambda b: lora_benchmark(DECODE, torch.bfloat16, "forward", 1, (b,)),
    "multi_lora mini bf16": lambda b: lora_benchmark(MINI, torch.bfloat16, "forward_backward", 1, (b,)),
    "grad_norm_per_sample": lambda b: norm_benchmark(NORM, torch.float32, 1),
    "grad_norm_per_sample mini": lambda b: norm_benchmark(MINI_NORM, torch.float32, 1),
    "accumulate": lambda b: accumulate_benchmark(NORM, torch.float32, 1),
    "router_score": lambda b: score_benchmark(SCORE, torch.float32, 1),
    "router_select": lambda b: select_benchmark(64, 9, 1),
    "masked_max_pool": lambda b: pool_benchmark(64, 256, 1024, torch.float32, 1),
}


@pytest.mark.parametrize("backend", cpu_backends())
@pytest.mark.parametrize("op", OPS)
def test_op(op: str, backend: str, benchmark: Any) -> None:
    found = OPS[op](backend)
    # "auto" and "exact" are the defaults.
    names = (backend, f"{backend}_auto", f"{backend}_exact")
    provider = next(p for p in found.providers if p.name in names)
    assert list(provider.judge()) == []
    benchmark.group = op
    benchmark(provider.run)
