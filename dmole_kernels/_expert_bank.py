# SPDX-License-Identifier: Apache-2.0
"""The LoRA experts of one linear layer: any number, any ranks, frozen or trainable, each an ordinary parameter pair."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import Tensor, nn


class ExpertDescription(TypedDict):
    rank: int
    alpha: float
    trainable: bool


class Expert(nn.Module):
    """`alpha / rank * B A`: lora_a [rank, in_features], lora_b [out_features, rank]."""

    def __init__(self, lora_a: Tensor, lora_b: Tensor, *, alpha: float) -> None:
        super().__init__()
        self.lora_a = nn.Parameter(lora_a)
        self.lora_b = nn.Parameter(lora_b)
        self.alpha = alpha
        self.rank = lora_a.shape[0]
        self.scale = alpha / self.rank

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, trainable={self.lora_a.requires_grad}"


class ExpertBank(nn.Module):
    """Named LoRA experts for a linear layer of `in_features` to `out_features`.

    Parameters are called `experts.<name>.lora_a` [rank, in_features] and `experts.<name>.lora_b` [out_features, rank]:
    plain tensors to optimizers, state_dict and safetensors. A state_dict holds tensors only; what it cannot say (alpha,
    and which experts there are) is `describe()`, JSON-able, and `restore(description)` makes the experts to load into.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.experts = nn.ModuleDict()
        # Follows the module through .to(), so that an expert added later is born where the others live.
        self.register_buffer("_place", torch.empty(0, device=device, dtype=dtype), persistent=False)
        self._place: Tensor

    def add(
        self,
        name: str,
        rank: int,
        *,
        alpha: float,
        trainable: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        """Adds an expert that computes zero: A kaiming-uniform(a = sqrt 5), B zeros, scale alpha / rank.

        A is drawn on the CPU from `generator` (torch's default one when None), so the numbers do not depend on the
        device.

        Raises:
            ValueError: for a name in use, empty or with a dot, a rank below 1, an alpha that is not finite.
        """
        if not name or "." in name or hasattr(nn.ModuleDict, name) or name in self.experts:
            taken = "is already an expert here" if name in self.experts else "cannot name a submodule"
            raise ValueError(
                f"name={name!r} {taken}; expected a new, non-empty name without dots that is no method of ModuleDict. "
                f"Experts: {list(self.names)}. Choose another name or remove() the old expert first."
            )
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank={rank!r} for expert {name!r}; expected an integer of at least 1. Use 8 to start.")
        if not math.isfinite(alpha):
            raise ValueError(f"alpha={alpha!r} for expert {name!r}; expected a finite number. Use twice the rank.")
        # kaiming_uniform(a = sqrt 5) has bound sqrt(6 / ((1 + 5) fan_in)).
        bound = 1.0 / math.sqrt(self.in_features)
        lora_a = torch.empty(rank, self.in_features, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        place = self._place
        expert = Expert(
            lora_a.to(device=place.device, dtype=place.dtype),
            torch.zeros(self.out_features, rank, device=place.device, dtype=place.dtype),
            alpha=float(alpha),
        )
        expert.requires_grad_(trainable)
        self.experts[name] = expert

    def expert(self, name: str) -> Expert:
        if name not in self.experts:
            raise ValueError(f"expert {name!r} is not in this bank; it has {list(self.names)}. Use add() first.")
        module = self.experts[name]
        assert isinstance(module, Expert)
        return module

    def freeze(self, name: str) -> None:
        """Stops training the expert and drops its gradients; it stays usable."""
        expert = self.expert(name)
        expert.requires_grad_(False)
        expert.zero_grad(set_to_none=True)

    def unfreeze(self, name: str) -> None:
        self.expert(name).requires_grad_(True)

    def remove(self, name: str) -> None:
        self.expert(name)
        del self.experts[name]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.experts.keys())

    def rank(self, name: str) -> int:
        return self.expert(name).rank

    def scale(self, name: str) -> float:
        return self.expert(name).scale

    def __contains__(self, name: object) -> bool:
        return name in self.experts._modules

    def __len__(self) -> int:
        return len(self.experts)

    def describe(self) -> dict[str, ExpertDescription]:
        """JSON-able {name: {rank, alpha, trainable}}, in order; the part of the bank a state_dict cannot hold."""
        return {
            name: {
                "rank": self.rank(name),
                "alpha": self.expert(name).alpha,
                "trainable": self.expert(name).lora_a.requires_grad,
            }
            for name in self.names
        }

    def restore(self, description: Mapping[str, ExpertDescription]) -> None:
        """Makes the bank hold exactly the described experts, zero-valued, ready for load_state_dict."""
        for name in self.names:
            self.remove(name)
        # A generator of its own: restoring must not move the default one, whose state a resume has just set.
        generator = torch.Generator()
        for name, entry in description.items():
            self.add(name, entry["rank"], alpha=entry["alpha"], trainable=entry["trainable"], generator=generator)
