# SPDX-License-Identifier: Apache-2.0
"""What a call allocates, and what it keeps for backward.

`peak_memory_mib` follows every allocation and release of PyTorch's CPU allocator (torch.profiler's memory events), so
it sees tensors made inside compiled ops too. It does not see memory that libraries allocate with malloc (packing
buffers of MKL and oneDNN, scratch memory of kernels).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_memory_mib(run: Callable[[], object], device: str = "cpu") -> float:
    """Largest sum of tensors alive on the device during `run()`, above what was alive before, in MiB."""
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = run()
    del kept
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak / 2**20


def saved_for_backward_bytes(forward: Callable[[], Tensor], weights: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that `forward` saves for backward, the storages of `weights` aside."""
    known = {tensor.untyped_storage().data_ptr() for tensor in weights}
    saved: dict[int, int] = {}
    alive: list[Tensor] = []  # the address of a storage freed meanwhile could be used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(saved.values())
