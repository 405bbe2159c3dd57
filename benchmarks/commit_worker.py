# SPDX-License-Identifier: Apache-2.0
"""Runs the summary's cases of the checkout that PYTHONPATH names; `benchmarks.against_commit` talks to two of these.

Prints the names of its rows, then reads lines "<row> <calls>" and prints the seconds that so many calls took. The file
also runs inside older checkouts, so it uses only names that both have.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch


def cases() -> dict[str, Callable[[], object]]:
    # Checkouts from before 2026-11-27 call a benchmark a contest, the summary a headline and a provider a contender.
    renamed = find_spec("benchmarks.contest") is None
    kind = "benchmark" if renamed else "contest"
    lora_benchmark = getattr(import_module(f"benchmarks.lora_{kind}"), f"lora_{kind}")
    sizes = import_module("benchmarks.summary" if renamed else "benchmarks.headline").Sizes()
    ours = import_module("benchmarks.lora_providers" if renamed else "benchmarks.lora_rivals").cpu_backends()[0]
    norms, proxies, routers = (import_module(f"benchmarks.{name}_suite") for name in ("grad_norm", "proxy", "router"))

    found = {}
    for name, dtype in (("bf16_top2", torch.bfloat16), ("fp32_top2", torch.float32)):
        found[name] = lora_benchmark(sizes.main, dtype, "forward_backward", 1, (ours,))
    for width in sizes.decode_widths:
        for rows in sizes.decode_rows:
            case = replace(sizes.main, name="decode", samples=rows, tokens=1, in_features=width, out_features=width)
            found[f"decode_bf16_{rows}_{width}"] = lora_benchmark(case, torch.bfloat16, "forward", 1, (ours,))
    for count in sizes.expert_counts:
        case = replace(sizes.experts_case, name=f"experts_{count}", ranks=(8,) * count)
        found[f"experts_{count}"] = lora_benchmark(case, torch.bfloat16, "forward_backward", 1, (ours,))
    runs = {name: _run(benchmark, ours) for name, benchmark in found.items()}
    for tokens in sizes.norm_tokens:
        shape = norms.NormCase(samples=4, tokens=tokens, in_features=sizes.norm_width, out_features=sizes.norm_width)
        runs[f"grad_norm_{tokens}"] = _run(getattr(norms, f"norm_{kind}")(shape, torch.float32, 1), f"{ours}_auto")
    proxy = getattr(proxies, f"proxy_{kind}")(sizes.proxy, torch.float32, 1)
    for method in ("exact", "sketch", "exact_frozen_linears"):
        runs[f"proxy_{method}"] = _run(proxy, f"{ours}_{method}")
    runs["router_score"] = _run(getattr(routers, f"score_{kind}")(sizes.router, torch.float32, 1), ours)
    return runs


def _run(benchmark: Any, provider: str) -> Callable[[], object]:
    if hasattr(benchmark, "contenders"):
        runs = {contender.provider: contender.run for contender in benchmark.contenders}
    else:
        runs = {found.name: found.run for found in benchmark.providers}
    run: Callable[[], object] = runs[provider]
    return run


def main() -> None:
    torch.set_num_threads(1)
    runs = cases()
    print(json.dumps(list(runs)), flush=True)
    for line in sys.stdin:
        name, calls = line.split()
        start = time.perf_counter()
        for _ in range(int(calls)):
            runs[name]()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
