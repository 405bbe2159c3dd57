# SPDX-License-Identifier: Apache-2.0
"""The emulator itself: it does what a GPU does, and says where one would hang."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import pytest

KERNELS = r"""
#include <cuda_runtime.h>

// Each thread adds its neighbour's number, which it must not read before it is there.
__global__ void neighbours(int* out, bool barrier) {
  __shared__ int shared[64];
  shared[threadIdx.x] = static_cast<int>(blockIdx.x * 100 + threadIdx.x);
  if (barrier) __syncthreads();
  out[blockIdx.x * 64 + threadIdx.x] = shared[63 - threadIdx.x];
  if (barrier) __syncthreads();
}

__global__ void warp_functions(int* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, lane, 5) + 100 * __shfl_up_sync(0xffffffffu, lane, 2);
  out[64 + threadIdx.x] = __popc(__ballot_sync(0xffffffffu, lane % 3 == 0)) + 100 * __shfl_sync(0xffffffffu, lane, 7);
  if (lane < 4) out[128 + threadIdx.x] = static_cast<int>(__ballot_sync(0xfu, lane != 1));
}

__global__ void half_a_barrier() {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void half_a_warp() {
  if (threadIdx.x % 2 == 0) __ballot_sync(0xffffffffu, true);
}

__global__ void two_places() {
  if (threadIdx.x % 2 == 0) {
    __ballot_sync(0xffffffffu, true);
  } else {
    __ballot_sync(0xffffffffu, false);
  }
}

__global__ void not_in_the_mask() { __ballot_sync(0x7fffffffu, true); }

__global__ void asks_a_stranger() {
  if (threadIdx.x < 4) __shfl_sync(0xfu, 1, 9);
}

extern "C" int run(int kernel, unsigned blocks, int* out) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(64);
  switch (kernel) {
    case 0: return cudaLaunchKernelEx(&config, neighbours, out, true);
    case 1: return cudaLaunchKernelEx(&config, neighbours, out, false);
    case 2: return cudaLaunchKernelEx(&config, warp_functions, out);
    case 3: return cudaLaunchKernelEx(&config, half_a_barrier);
    case 4: return cudaLaunchKernelEx(&config, half_a_warp);
    case 5: return cudaLaunchKernelEx(&config, two_places);
    case 6: return cudaLaunchKernelEx(&config, not_in_the_mask);
    default: return cudaLaunchKernelEx(&config, asks_a_stranger);
  }
}
"""
ORDERS = ("forward", "reverse", "shuffled")
LAUNCH_FAILURE, INVALID_CONFIGURATION = 719, 9


@pytest.fixture(scope="module")
def library(host: Any, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("emulator")
    source = folder / "kernels.cpp"
    source.write_text(KERNELS, encoding="utf-8")
    emulator = Path(__file__).resolve().parent / "emulator"
    path = folder / "kernels.so"
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", f"-I{emulator}", f"-I{emulator.parents[3] / 'csrc'}",
         str(source), str(emulator / "emulator.cpp"), "-o", str(path)],
        check=True, timeout=120,
    )  # fmt: skip
    loaded = ctypes.CDLL(str(path))
    loaded.emulator_problem.restype = ctypes.c_char_p
    return loaded


def run(library: ctypes.CDLL, kernel: int, order: str = "forward", blocks: int = 2) -> tuple[int, str, list[int]]:
    out = (ctypes.c_int * 192)(*[-1] * 192)
    library.emulator_set_order(ORDERS.index(order), 3)
    error = library.run(kernel, blocks, out)
    return error, library.emulator_problem().decode(), list(out)


@pytest.mark.parametrize("order", ORDERS)
def test_a_barrier_holds_in_every_order(library: ctypes.CDLL, order: str) -> None:
    error, problem, out = run(library, 0, order)
    assert (error, problem) == (0, "")
    assert out[:128] == [100 * block + 63 - thread for block in range(2) for thread in range(64)]


def test_a_missing_barrier_shows_in_some_order(library: ctypes.CDLL) -> None:
    assert len({tuple(run(library, 1, order)[2]) for order in ORDERS}) == 3


@pytest.mark.parametrize("order", ORDERS)
def test_warp_functions(library: ctypes.CDLL, order: str) -> None:
    error, problem, out = run(library, 2, order, blocks=1)
    assert (error, problem) == (0, "")
    assert out[:64] == 2 * [(lane ^ 5) + 100 * (lane - 2 if lane >= 2 else lane) for lane in range(32)]
    assert out[64:128] == [11 + 700] * 64
    assert out[128:132] == out[160:164] == [0b1101] * 4
    assert set(out[132:160]) == {-1}


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (3, "at a barrier that not all threads reach"),
        (4, "for lanes of its mask that do not come"),
        (5, "meet in lines"),
        (6, "is not in its own mask in line"),
        (7, "asks for lane 9, which its mask leaves out"),
    ],
)
def test_what_would_hang_or_be_undefined_is_an_error_and_the_next_launch_runs(
    library: ctypes.CDLL, kernel: int, said: str
) -> None:
    for order in ORDERS:
        error, problem, _ = run(library, kernel, order)
        assert error == LAUNCH_FAILURE
        assert said in problem and " line" in problem
    assert run(library, 0)[0] == 0


def test_an_empty_grid_is_refused_as_on_a_gpu(library: ctypes.CDLL) -> None:
    assert run(library, 0, blocks=0)[0] == INVALID_CONFIGURATION
