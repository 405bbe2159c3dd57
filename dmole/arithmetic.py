# SPDX-License-Identifier: Apache-2.0
"""What decides the last bits of a result besides its inputs, so that cached numbers can be kept free of it.

A sum of floats depends on the order of its terms. The libraries below torch choose that order by the shape of the call,
the number of threads and the processor. Measured on a Zen 4 with torch 2.13.0, float32, for the features of one image
that a small convolutional network computes: batches of 1 to 8 give the same bits, batches of 16 and more others; two
threads give other bits than one at every batch size. After rounding to float16 one value in 400 differs, which is
enough to change the loss of a training run from the first step that reads it.

A cached number is therefore computed

    alone            one image or one batch whose composition is part of the key
    with one thread  `one_thread()`; several workers of one thread each are as fast as one call with several threads
    under a key      that contains `arithmetic()`: the processor and the libraries
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
from collections.abc import Iterator

import torch

from dmole.machine import processor

# Variables by which the libraries below torch are told to take other code.
VARIABLES = ("ATEN_", "DNNL_", "MKL_", "ONEDNN_")
# Not decisions about the order of a sum: counts of threads are set per call, and the rest only prints.
IGNORED = ("MKL_NUM_THREADS", "MKL_DYNAMIC", "MKL_VERBOSE", "DNNL_VERBOSE", "ONEDNN_VERBOSE")
# What /proc/cpuinfo says about a processor's identity; the clock and the like change from one reading to the next.
PROCESSOR_FIELDS = ("vendor_id", "cpu family", "model", "model name", "stepping", "cache size", "flags", "Features")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch's operators run with one thread inside, in the calling Python thread; the number before is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def arithmetic() -> str:
    """The sha256 of everything but inputs and threads that decides the bits of torch's operators on this CPU.

    The processor (model, instruction set, cache), torch's build with its libraries, the variables that steer these
    libraries, and torch's precision settings. Processes with equal values compute equal bits with equal thread counts.
    """
    variables = {k: v for k, v in os.environ.items() if k.startswith(VARIABLES) and k not in IGNORED}
    mkldnn = torch.backends.mkldnn
    settings = {
        "mkldnn": mkldnn.enabled,
        "float32_matmul": torch.get_float32_matmul_precision(),
        # bfloat16 or tf32 inside float32 operators; "none" is what "ieee" is before anybody has set it.
        "inside": [
            str(getattr(place, "fp32_precision", "none")).replace("none", "ieee")
            for place in (torch.backends, mkldnn, getattr(mkldnn, "conv", None), getattr(mkldnn, "matmul", None))
        ],
    }
    fields = {key: value for key, value in processor().items() if key in PROCESSOR_FIELDS}
    own = {"machine": platform.machine(), "processor": platform.processor(), **fields}
    described = {
        "processor": own,
        "torch": _torch_build(),
        "variables": variables,
        "settings": settings,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


@functools.cache
def _torch_build() -> list[str]:
    return [torch.__version__, torch.__config__.show()]
