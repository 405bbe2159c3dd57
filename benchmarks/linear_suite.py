# SPDX-License-Identifier: Apache-2.0
"""The product with a frozen weight, by PyTorch's BLAS and by this package's kernel; input of `cpu.takes_linear`.

pytorch    F.linear, and grad @ weight for the input's gradient
own        the same products by `cpu_frozen_linear`, regardless of the table
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.benchmark import Benchmark, Provider
from dmole_kernels import cpu
from dmole_kernels.testing import judge, product_error, rejected

ROWS = (1, 4, 8, 16, 24, 64, 256, 2048)
# in, out: attention and MLP of a small vision tower (ViT of the mini model), ViT-L, and LLMs of 2048 and 4096.
LAYERS = ((192, 192), (192, 768), (1024, 1024), (2048, 2048), (4096, 4096), (4096, 11008))
LARGEST = 2**36  # multiply-adds of a call; larger calls show nothing new


def linear_benchmark(
    rows: int, features: int, outputs: int, dtype: torch.dtype, direction: str, threads: int
) -> Benchmark:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(outputs, features, generator=generator) * features**-0.5).to(dtype)
    width = features if direction == "forward" else outputs
    x = torch.randn(rows, width, generator=generator).to(dtype)
    matrix = weight if direction == "forward" else weight.t()
    runs: dict[str, Callable[[], Tensor]] = {
        "pytorch": lambda: F.linear(x, matrix),
        "own": lambda: torch.ops.dmole_kernels.cpu_frozen_linear(x, matrix, None),
    }
    flops = 2.0 * rows * weight.numel()
    exact = F.linear(x.double(), matrix.double())
    return Benchmark(
        case=f"linear_{rows}_{features}_{outputs}",
        dtype=dtype,
        direction=direction,
        threads=threads,
        providers=[
            Provider(name=name, run=run, judge=_judge(run, product_error(x, matrix, dtype), exact), flops=flops)
            for name, run in runs.items()
        ],
        added_flops=flops,
        added_bytes=float((weight.numel() + x.numel() + exact.numel()) * weight.element_size()),
    )


def _judge(run: Callable[[], Tensor], expected: float, exact: Tensor) -> Callable[[], Sequence[str]]:
    return lambda: rejected(judge({"y": run()}, {"y": expected}, {"y": exact}))


def benchmarks(only: str = "*") -> Iterator[Benchmark]:
    if cpu.EXTENSION is None:
        raise ValueError(f"the suite needs the compiled extension ({cpu.MISSING}); expected it built. Run make setup.")
    for features, outputs in LAYERS:
        for rows in ROWS:
            if rows * features * outputs > LARGEST or not fnmatch(f"linear_{rows}_{features}_{outputs}", only):
                continue
            for dtype in (torch.float32, torch.bfloat16):
                for direction in ("forward", "input_gradient"):
                    yield linear_benchmark(rows, features, outputs, dtype, direction, 1)
