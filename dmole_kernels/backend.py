# SPDX-License-Identifier: Apache-2.0
"""
    choose_backend(requested, device_type) -> (name, reason)

Which implementation runs an op: a pure function of its arguments whose answer and reason can be printed
(`python -m dmole_kernels`). What is asked for and does not exist is an error, never a silent replacement.

A backend enters here by name in `BACKENDS` and in the table of kernels of each op file; nothing else chooses.
"""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

# Name -> device types it serves; None means any device PyTorch serves. Fastest first: "auto" takes the first that fits.
BACKENDS: dict[str, tuple[str, ...] | None] = {"reference": None}


@dataclass(frozen=True, kw_only=True)
class BackendChoice:
    name: str
    reason: str


def choose_backend(requested: str = "auto", device_type: str = "cpu") -> BackendChoice:
    """The backend for tensors on `device_type`. Raises ValueError for a name that is not available there."""
    if requested == "auto":
        for name, devices in BACKENDS.items():
            if devices is None or device_type in devices:
                return BackendChoice(name=name, reason=f"the first of {tuple(BACKENDS)} that serves {device_type}")
    if requested not in BACKENDS:
        raise ValueError(
            f"backend={requested!r} is not in this build of dmole_kernels; expected 'auto' or one of "
            f"{', '.join(map(repr, BACKENDS))}. Pass backend='auto' or backend='reference'."
        )
    devices = BACKENDS[requested]
    if devices is not None and device_type not in devices:
        raise ValueError(
            f"backend={requested!r} got a tensor on {device_type!r}; expected {', '.join(devices)}. "
            f"Move the tensors or pass backend='auto'."
        )
    return BackendChoice(name=requested, reason="asked for by name")


def explain_backend(requested: str = "auto") -> str:
    """What would run here and why, with what this machine offers, in a few lines."""
    choice = choose_backend(requested)
    lines = [
        f"backend   {choice.name} ({choice.reason})",
        f"built     {', '.join(BACKENDS)}",
        f"torch     {torch.__version__}, {torch.get_num_threads()} thread(s)",
        f"cpu       {platform.machine()}, {torch.backends.cpu.get_cpu_capability()} kernels in PyTorch",
    ]
    if torch.cuda.is_available():
        lines.append(
            f"cuda      {torch.cuda.get_device_name()}, {choose_backend(requested, 'cuda').name} would run on it"
        )
    else:
        lines.append("cuda      no device")
    return "\n".join(lines)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """For the inside of a kernel, which has settled its dtypes; costs nothing where autocast is off."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
