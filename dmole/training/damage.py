# SPDX-License-Identifier: Apache-2.0
"""Damage that a loss cannot show, because a loss is looked at before its step: found before anything is stored.

    gradients     finite before each optimizer step (with float16 the scaler skips such a step itself)
    parameters    finite at the end of a stage and before each checkpoint inside one
    logits        finite at the end of a stage, on its first batch
    base          every weight as it was when the run started, at the end of a stage and before each checkpoint

What is found is a `DamageError`: nothing is written any more, and the last checkpoint, from before it, stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

KEPT = "The last checkpoint is from before it, and --resume goes on from there."


class DamageError(ValueError):
    """Numbers of a run that cannot be used; the message names the stage, the step and what to do."""


def check_finite(tensors: Mapping[str, Tensor], where: str, learning_rate: float) -> None:
    """Raise `DamageError` for the first of `tensors` that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise DamageError(
                f"{name} has {count} of {tensor.numel()} values that are not finite {where}; expected finite numbers. "
                f"{remedy(learning_rate)}"
            )


def check_norm(norm: float, where: str, learning_rate: float) -> None:
    """Raise `DamageError` for a norm of all gradients that is not finite."""
    if not math.isfinite(norm):
        raise DamageError(
            f"the norm of the gradients is {norm} {where}; expected a finite number. {remedy(learning_rate)}"
        )


def remedy(learning_rate: float) -> str:
    """What to do about numbers that are not finite."""
    return f"Lower training.learning_rate (now {learning_rate:g}) in a run of its own. {KEPT}"


def gradient_norm(parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """The 2-norm over the gradients of all parameters."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])


def weight_sums(model: nn.Module) -> dict[str, int]:
    """By name of a parameter of `model`, the sum of its values' bits as integers, and of every second one: two reads of
    the memory, on its device. Any single change of a value changes it."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = {}
    for name, parameter in model.named_parameters():
        plain = parameter.detach()
        if type(plain) is not Tensor or plain.is_meta or plain.element_size() not in whole:
            continue  # quantized or offloaded: no plain memory to read
        parts = plain.contiguous().flatten().view(whole[plain.element_size()])
        sums[name] = int(parts.sum(dtype=torch.int64)) + 2**40 * int(parts[::2].sum(dtype=torch.int64))
    return sums


def check_unchanged(model: nn.Module, expected: Mapping[str, int], where: str) -> None:
    """Raise `DamageError` for a base weight whose `weight_sums` are not those of the start."""
    for name, value in weight_sums(model).items():
        if value != expected[name]:
            raise DamageError(
                f"{name} of the base model has changed {where}; expected the weights that the run started with. "
                f"Look for a kernel, hook or layer that writes into them. {KEPT}"
            )
