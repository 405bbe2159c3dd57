# SPDX-License-Identifier: Apache-2.0
"""
    python -m benchmarks.base_product [--output benchmarks/results/base_product.json]

Checks whether the bits of a row depend on the number of rows in the batch or on the number of threads: for the base
product (`F.linear`), where this package makes no guarantee, and for the experts' delta, where the cpu backend does.
Calls are compared with the first rows of one call on 256 rows with one thread; nothing is timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import this_machine
from dmole_kernels import multi_lora
from dmole_kernels.testing import dtype_name, threads

DTYPES = (torch.float32, torch.bfloat16)
WIDTHS = ((96, 64), (1024, 1024), (2048, 2048), (4096, 11008))
ROWS = (1, 2, 3, 16, 64, 255)
WHOLE = 256
RANKS = (4, 16, 9)


def calls_that_differ(product: Callable[[int], Tensor], thread_counts: Iterable[int]) -> list[str]:
    """The calls, as "rows x threads", whose rows differ in any bit from the full batch; product(n) uses the first n."""
    with threads(1):
        whole = product(WHOLE)
    differing = []
    for count in thread_counts:
        with threads(count):
            differing += [f"{n} x {count}" for n in (*ROWS, WHOLE) if not torch.equal(product(n), whole[:n])]
    return differing


def compare(dtype: torch.dtype, in_features: int, out_features: int, thread_counts: Iterable[int]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, weight = draw(WHOLE, in_features), draw(out_features, in_features)
    a, b = [draw(rank, in_features) for rank in RANKS], [draw(out_features, rank) for rank in RANKS]
    gate = torch.rand(WHOLE, len(RANKS), generator=generator)
    gate[gate < 0.4] = 0.0

    def delta(rows: int) -> Tensor:
        return multi_lora(x[:rows], None, a, b, gate[:rows], [1.0] * len(RANKS), backend="cpu")

    with torch.no_grad():
        return {
            "dtype": dtype_name(dtype),
            "in_features": in_features,
            "out_features": out_features,
            "base product differs": calls_that_differ(lambda n: F.linear(x[:n], weight), thread_counts),
            "delta differs": calls_that_differ(delta, thread_counts),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[2])
    parser.add_argument("--output", type=Path)
    output = parser.parse_args().output
    machine = this_machine()
    report = {
        "machine": machine.name,
        "versions": machine.versions,
        "commit": machine.commit,
        "calls": f"rows {', '.join(map(str, (*ROWS, WHOLE)))} x threads 1, 2",
        "cases": [compare(dtype, *widths, (1, 2)) for dtype in DTYPES for widths in WIDTHS],
    }
    text = json.dumps(report, indent=1)
    if output is None:
        print(text)
    else:
        output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
