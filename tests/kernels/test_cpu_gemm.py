# SPDX-License-Identifier: Apache-2.0
"""The product under the ops without a special form: any strides, any size, a result that depends on its operands."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dmole_kernels import cpu
from dmole_kernels.testing import poisoned_memory

pytestmark = pytest.mark.skipif(cpu.EXTENSION is None, reason=f"no compiled extension: {cpu.MISSING}")

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = [(0, 3, 5), (3, 5, 0), (1, 1, 1), (5, 7, 3), (13, 33, 17), (40, 64, 300), (200, 70, 513)]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def gemm(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.ops.dmole_kernels.cpu_gemm(a, b)
    return product


def laid_out(matrix: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return matrix.t().contiguous().t()
    return torch.stack([matrix, matrix], 2)[:, :, 0] if layout == "strided" else matrix


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=lambda pair: "-".join(map(str, pair)))
@pytest.mark.parametrize("layout_b", ["rows", "transposed", "strided"])
@pytest.mark.parametrize("layout_a", ["rows", "transposed", "strided"])
def test_near_float64(level: str, layout_a: str, layout_b: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, columns, depth in SHAPES:
        a = torch.randn(rows, depth, generator=generator).to(dtypes[0])
        b = torch.randn(depth, columns, generator=generator).to(dtypes[1])
        actual = gemm(laid_out(a, layout_a), laid_out(b, layout_b))
        exact = a.double() @ b.double()
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), exact, rtol=0, atol=6e-6 * (depth + 1) ** 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_an_element_does_not_depend_on_the_size_of_the_call(level: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(250, 700, generator=generator).to(dtype)
    b = torch.randn(700, 90, generator=generator).to(dtype)
    whole = gemm(a, b)
    for rows, columns in ((slice(0, 1), slice(0, 1)), (slice(7, 20), slice(3, 37)), (slice(240, 250), slice(0, 90))):
        assert torch.equal(gemm(a[rows], b[:, columns]), whole[rows, columns])


def test_errors_tell_what_to_do() -> None:
    with pytest.raises(ValueError, match="gemm: b is Double; the cpu backend expects float32 or bfloat16. Cast it or"):
        gemm(torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"a has shape \[2, 3\] and b \[2, 3\]; expected \[M, K\] and \[K, N\]"):
        gemm(torch.zeros(2, 3), torch.zeros(2, 3))


@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="this PyTorch has no OpenMP")
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system does not list a process's threads")
def test_two_threads_are_two_threads() -> None:
    """The loop over blocks is torch's, but inline: compiled without OpenMP it would be a plain loop, and right."""
    code = """
import os, torch
import dmole_kernels
torch.set_num_threads(1)
x, weight = torch.ones(512, 512), torch.ones(512, 512)
torch.ops.dmole_kernels.cpu_frozen_linear(x, weight, None)
before = len(os.listdir("/proc/self/task"))
torch.set_num_threads(2)
torch.ops.dmole_kernels.cpu_frozen_linear(x, weight, None)
print(len(os.listdir("/proc/self/task")) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
