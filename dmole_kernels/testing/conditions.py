# SPDX-License-Identifier: Apache-2.0
"""Conditions for the time of a test or a benchmark: poisoned memory, a number of threads, Triton on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import deterministic

from dmole_kernels import cpu, triton_backend
from dmole_kernels._backend import BACKENDS, DTYPES


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Exposes reads of unwritten memory: in the block every `torch.empty` is full of NaN (or the largest integer), and
    so is the work memory of the compiled kernels."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    if cpu.EXTENSION is not None:
        cpu.EXTENSION.poison_scratch(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        if cpu.EXTENSION is not None:
            cpu.EXTENSION.poison_scratch(False)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """`torch.set_num_threads(count)` for the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def triton_on_cpu() -> Iterator[None]:
    """`backend="triton"` for tensors on the CPU in the block, in every dtype: for Triton's interpreter, which runs the
    kernels there (TRITON_INTERPRET=1 before Triton is imported)."""
    if not triton_backend.available():
        raise ValueError(triton_backend.MISSING)
    before = BACKENDS["triton"], DTYPES["triton"]
    BACKENDS["triton"], DTYPES["triton"] = ("cpu", "cuda"), None
    try:
        yield
    finally:
        BACKENDS["triton"], DTYPES["triton"] = before
