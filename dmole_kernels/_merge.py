# SPDX-License-Identifier: Apache-2.0
"""
    W' = W + sum_e weight_e alpha_e / rank_e B_e A_e

Merges experts into the weight of the base; unmerging restores its original bits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmole_kernels._expert_bank import ExpertBank
from dmole_kernels._multi_lora_linear import MultiLoRALinear

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_mergeable(place: str, layer: MultiLoRALinear, name: str) -> None:
    """Raises ValueError for a base whose weight is not a plain tensor, and for an expert that is not finite."""
    weight = layer.base._parameters.get("weight")
    plain = (
        type(layer.base) is nn.Linear
        and type(weight) is nn.Parameter
        and type(weight.data) is Tensor
        and weight.dtype in _DTYPES
        and not weight.is_meta
    )
    if not plain:
        found = type(layer.base).__name__ + ("" if weight is None else f" with {_describe(weight)}")
        raise ValueError(
            f"{place}: the base is a {found}; expected an nn.Linear with a plain floating-point weight. An expert "
            f"cannot be merged into quantised or sharded weights; keep it gated."
        )
    expert = layer.bank.expert(name)
    if not all(bool(torch.isfinite(p).all()) for p in (expert.lora_a, expert.lora_b)):
        raise ValueError(
            f"{place}: expert {name!r} holds inf or NaN; expected finite values. Merged, it would spoil every sample."
        )


def set_merged(layer: MultiLoRALinear, merged: dict[str, float]) -> None:
    """Sets the base's weight to the original plus these experts, each times its factor."""
    weight = layer.base.weight
    original = layer.unmerged_weight
    with torch.no_grad():
        if original is None:
            original = weight.detach().clone()
        if merged:
            sum_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            total = original.to(sum_dtype)
            total = total.clone() if total is original else total
            for name, factor in merged.items():
                expert = layer.bank.expert(name)
                lora_a, lora_b = (p.detach().to(total) for p in (expert.lora_a, expert.lora_b))
                total.addmm_(lora_b, lora_a, alpha=factor * expert.scale)
            weight.copy_(total)
        else:
            weight.copy_(original)
    layer.unmerged_weight = original if merged else None
    layer.bank.merged = dict(merged)
    ExpertBank.changes += 1


def _describe(weight: Tensor) -> str:
    return f"a {type(weight.data).__name__} of {str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
