# SPDX-License-Identifier: Apache-2.0
"""
    python tests/kernels/guarded_memory.py LEVEL

Runs every compiled op at one instruction set on tensors whose first or last byte is next to a page that no code may
touch, so that a single byte read or written outside ends the process. This sees what a sanitizer does not: vector loads
and stores under a mask. Then compares with the results on ordinary memory.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import sys
from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from dmole_kernels import cpu
from dmole_kernels._lora_call import LoraCall, Wanted

PAGE = mmap.PAGESIZE
PROT_NONE = 0
Place = Callable[[Tensor], Tensor]
libc = ctypes.CDLL(None, use_errno=True)


def guarded(tensor: Tensor, *, at_end: bool) -> Tensor:
    """A contiguous copy that ends (or begins) at a forbidden page."""
    size = tensor.numel() * tensor.element_size()
    room = -(-max(1, size) // PAGE) * PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, room + PAGE):
        if libc.mprotect(ctypes.c_void_p(address + page), ctypes.c_size_t(PAGE), PROT_NONE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect refused a guard page")
    if size == 0:
        return tensor.clone()
    offset = PAGE + room - size if at_end else PAGE
    # The tensor keeps the mapping alive; its pages are given back with it.
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return copy.copy_(tensor)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lora(place: Place, dtype: torch.dtype, width: int, outputs: int, dropout: float) -> Iterator[Tensor]:
    rows, ranks = 13, (1, 5, 16, 33)
    x, base, grad = (place(draw(rows, n, dtype=dtype, seed=i)) for i, n in enumerate((width, outputs, outputs)))
    for weights in {dtype, torch.float32}:
        a = [place(draw(r, width, dtype=weights, seed=3)) for r in ranks]
        b = [place(draw(outputs, r, dtype=weights, seed=4)) for r in ranks]
        gate = place(draw(rows, len(ranks), seed=5).clamp(min=0.0))
        seed = torch.tensor(11) if dropout else None
        switches = ([1.0, 0.5, 2.0, -1.0], dropout, True, seed)
        for every_column in (False, True):
            yield from cpu.multi_lora_forward(LoraCall(x, base, a, b, gate, *switches, every_column))
        _, shrunk = cpu.multi_lora_forward(LoraCall(x, None, a, b, gate, *switches))
        call = LoraCall(x, None, a, b, gate, *switches)
        yield from cpu.multi_lora_backward(call, grad, place(shrunk), Wanted(True, True, [True, False, True, True]))


def norms(place: Place, dtype: torch.dtype, width: int, outputs: int) -> Iterator[Tensor]:
    ops = torch.ops.dmole_kernels
    x, grad = place(draw(3, 23, width, dtype=dtype)), place(draw(3, 23, outputs, dtype=dtype, seed=1))
    for method in ("direct", "ghost"):
        yield ops.cpu_squared_norm(x, grad, method)
    buffer, sketch = place(draw(outputs, width, seed=2)), place(draw(7, 5, seed=3))
    rows, grad_rows = x[0], grad[0]
    ops.cpu_accumulate_gradient(buffer, rows, grad_rows)
    ops.cpu_accumulate_sketch(sketch, rows, grad_rows, place(draw(outputs, 7)), place(draw(width, 5, seed=1)))
    yield from (buffer, sketch)
    yield ops.cpu_gemm(rows.t(), grad_rows)
    yield ops.cpu_gemm(rows, place(draw(width, outputs, dtype=dtype)))


def linear(place: Place, dtype: torch.dtype, width: int, outputs: int) -> Iterator[Tensor]:
    # Few rows and many: two forms of the product.
    for rows in (2, 27):
        x = place(draw(rows, width, dtype=dtype))
        for weights in {dtype, torch.float32}:
            weight, bias = place(draw(outputs, width, dtype=weights)), place(draw(outputs, dtype=weights))
            yield torch.ops.dmole_kernels.cpu_frozen_linear(x, weight, bias)
            yield torch.ops.dmole_kernels.cpu_frozen_linear(x, place(draw(width, outputs, dtype=weights)).t(), None)


def router(place: Place, dtype: torch.dtype, width: int, hidden: int) -> Iterator[Tensor]:
    ops = torch.ops.dmole_kernels
    shapes = ((9, width), (2, hidden, width), (2, hidden), (2, width, hidden), (2, width))
    for sigmoid in (True, False):
        yield ops.cpu_router_score(*(place(draw(*shape, dtype=dtype)) for shape in shapes), sigmoid)
    yield ops.cpu_router_select(place(draw(9, width)), place(draw(width)), 2)
    yield from ops.cpu_masked_max_pool(place(draw(2, 5, width, dtype=dtype)), place(draw(2, 5) > -1.0))


def results(place: Place) -> list[Tensor]:
    found: list[Tensor] = []
    for dtype, (width, outputs) in product(
        (torch.float32, torch.bfloat16), ((1, 1), (7, 3), (16, 32), (33, 47), (130, 63), (515, 21), (1031, 21))
    ):
        for dropout in (0.0, 0.3):
            found += lora(place, dtype, width, outputs, dropout)
        found += norms(place, dtype, width, outputs)
        found += linear(place, dtype, width, outputs)
        found += router(place, dtype, width, outputs)
    return found


if __name__ == "__main__":
    faulthandler.enable()
    cpu.set_isa(sys.argv[1])
    expected = results(lambda tensor: tensor)
    for at_end in (True, False):
        beside = results(lambda tensor, at_end=at_end: guarded(tensor, at_end=at_end))  # type: ignore[misc]
        for ordinary, other in zip(expected, beside, strict=True):
            torch.testing.assert_close(other, ordinary, rtol=0, atol=0, equal_nan=True)
    print(f"{cpu.isa()}: {len(expected)} results")
