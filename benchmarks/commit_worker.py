# SPDX-License-Identifier: Apache-2.0
"""Runs the summary's cases of the checkout that PYTHONPATH names; `benchmarks.against_commit` talks to two of these.

Reads lines "<row> <calls>" and answers with the seconds that so many calls took; begins by printing the rows it has.
The file runs inside an older checkout too, so it takes nothing from the packages but what both have.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch


def cases() -> dict[str, Callable[[], object]]:
    from benchmarks.grad_norm_suite import NormCase, norm_contest
    from benchmarks.headline import Sizes
    from benchmarks.lora_contest import lora_contest
    from benchmarks.lora_rivals import cpu_backends
    from benchmarks.proxy_suite import proxy_contest
    from benchmarks.router_suite import score_contest

    sizes, ours = Sizes(), cpu_backends()[0]
    found = {}
    for name, dtype in (("bf16_top2", torch.bfloat16), ("fp32_top2", torch.float32)):
        found[name] = lora_contest(sizes.main, dtype, "forward_backward", 1, (ours,))
    for width in sizes.decode_widths:
        for rows in sizes.decode_rows:
            case = replace(sizes.main, name="decode", samples=rows, tokens=1, in_features=width, out_features=width)
            found[f"decode_bf16_{rows}_{width}"] = lora_contest(case, torch.bfloat16, "forward", 1, (ours,))
    for count in sizes.expert_counts:
        case = replace(sizes.experts_case, name=f"experts_{count}", ranks=(8,) * count)
        found[f"experts_{count}"] = lora_contest(case, torch.bfloat16, "forward_backward", 1, (ours,))
    runs = {name: contest.contenders[0].run for name, contest in found.items()}
    for tokens in sizes.norm_tokens:
        shape = NormCase(samples=4, tokens=tokens, in_features=sizes.norm_width, out_features=sizes.norm_width)
        runs[f"grad_norm_{tokens}"] = _run(norm_contest(shape, torch.float32, 1), f"{ours}_auto")
    proxy = proxy_contest(sizes.proxy, torch.float32, 1)
    for method in ("exact", "sketch", "exact_frozen_linears"):
        runs[f"proxy_{method}"] = _run(proxy, f"{ours}_{method}")
    runs["router_score"] = _run(score_contest(sizes.router, torch.float32, 1), ours)
    return runs


def _run(contest: object, provider: str) -> Callable[[], object]:
    (found,) = (c.run for c in contest.contenders if c.provider == provider)  # type: ignore[attr-defined]
    return found  # type: ignore[no-any-return]


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
