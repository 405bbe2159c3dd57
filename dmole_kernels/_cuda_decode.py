# SPDX-License-Identifier: Apache-2.0
"""
    largest_rows(target) -> rows up to which "auto" decodes with CUDA C++ on that GPU; 0: never

The table that `backend` reads: for how many rows the CUDA C++ kernels were measured faster than Triton's, by the
targets of `triton_backend/configs.py`.

2026-11-22: empty. Nothing was measured: the kernels have not run on a GPU, so they are reached by name only.
"""

from __future__ import annotations

import torch

from dmole_kernels.triton_backend.configs import target_of_capability

MEASURED_ON = "2026-11-22"
FASTER_UP_TO: dict[str, int] = {}


def largest_rows(target: str) -> int:
    return FASTER_UP_TO.get(target, 0)


def this_target() -> str:
    """The table's name for the current GPU. Raises ValueError for one older than the table."""
    return target_of_capability(*torch.cuda.get_device_capability())
