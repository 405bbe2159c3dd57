# SPDX-License-Identifier: Apache-2.0
"""Checks that every op makes on every backend: tensors on one device, floating-point dtypes."""

from __future__ import annotations

import torch
from torch import Tensor


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_one_device(**tensors: Tensor | None) -> None:
    """Raises ValueError where a tensor is on another device than the first one; None is ignored."""
    (first, leader), *others = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    for name, tensor in others:
        if tensor.device != leader.device:
            raise ValueError(
                f"{name} is on {tensor.device} and {first} on {leader.device}; expected one device. Move one of them "
                f"with .to()."
            )


def check_floating(**tensors: Tensor) -> None:
    """Raises ValueError for integers and booleans, which would be cut to whole numbers on the way."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"{name} is {dtype_name(tensor.dtype)}; expected a floating-point dtype. Cast it, e.g. with .float()."
            )
