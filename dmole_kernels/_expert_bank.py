# SPDX-License-Identifier: Apache-2.0
"""The LoRA experts of one linear layer: any number, any ranks, frozen or trainable, each an ordinary parameter pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor, nn


class ExpertDescription(TypedDict):
    """What a state_dict cannot say about an expert; JSON-able."""

    rank: int
    alpha: float
    trainable: bool


class Expert(nn.Module):
    """`alpha / rank * B A`: lora_a [rank, in_features], lora_b [out_features, rank].

    `alpha` may be set at any time; `scale` follows. `.to(bfloat16)` and `.half()` move the parameters but leave them in
    float32 (or float64), because small updates vanish in 16 bits.
    """

    def __init__(self, lora_a: Tensor, lora_b: Tensor, *, alpha: float) -> None:
        super().__init__()
        self.lora_a = nn.Parameter(lora_a)
        self.lora_b = nn.Parameter(lora_b)
        self.rank = lora_a.shape[0]
        self.alpha = alpha

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "alpha":
            value = check_alpha(value, "this expert")
            self.__dict__["scale"] = value / self.rank
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # Every assignment passes here; DTensor without importing it. FSDP2 shows plain tensors while a module runs,
        # so what was sharded once stays marked.
        if hasattr(param, "device_mesh"):
            self.__dict__["sharded"] = True
            ExpertBank.changes += 1
        super().register_parameter(name, param)

    scale: float
    sharded = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Expert:
        def without_16_bits(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            allowed = moved.dtype in (torch.float32, torch.float64) or not moved.is_floating_point()
            return moved if allowed else tensor.to(moved.device)

        super()._apply(without_16_bits, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, trainable={self.lora_a.requires_grad}"


def sharded_error(name: str) -> ValueError:
    return ValueError(
        f"experts: got {name!r}, whose parameters are sharded (DTensor); expected plain tensors on every process: "
        f"sharding adds up gradients by position, so processes that use different experts would train each other's. "
        f"Pass fully_shard(..., ignored_params=set(experts.parameters())) and call experts.reduce_gradients() after "
        f"backward; for adapters of PEFT their parameters, and dmole_kernels.peft.reduce_gradients(model)."
    )


def check_alpha(alpha: object, owner: str) -> float:
    """`alpha` as a float. Raises ValueError when it is not a finite number."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"alpha={alpha!r} for {owner}; expected a finite number. Use twice the rank.")
    return float(alpha)


class ExpertBank(nn.Module):
    """Named LoRA experts for a linear layer of `in_features` to `out_features`.

    Parameters are called `experts.<name>.lora_a` [rank, in_features] and `experts.<name>.lora_b` [out_features, rank]:
    plain tensors to optimizers, state_dict and safetensors. A state_dict holds tensors only; alpha and the list of
    experts are in `describe()`, JSON-able, and `restore(description)` creates the experts to load into.

    Args:
        like: the module whose `weight` determines the device of the first expert; later ones are placed with the
            existing experts. None: `device`.
    """

    changes = 0  # Number of changes to the experts of any bank; caches derived from names compare it.

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        like: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.device = device
        # In a tuple, so that it is not registered as a child; its state belongs to the layer.
        self._like = (like,)
        self.experts = nn.ModuleDict()
        self._names: tuple[str, ...] = ()
        self.merged: dict[str, float] = {}  # experts merged into the base's weight, with their factors

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
            ValueError: for a name in use, empty, with a dot or already an attribute of modules, a rank below 1, an
                alpha that is not a finite number.
        """
        self.check_new(name)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank={rank!r} for expert {name!r}; expected an integer of at least 1. Use 8 to start.")
        alpha = check_alpha(alpha, f"expert {name!r}")
        # kaiming_uniform(a = sqrt 5) has bound sqrt(6 / ((1 + 5) fan_in)).
        bound = 1.0 / math.sqrt(self.in_features)
        lora_a = torch.empty(rank, self.in_features, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        device, dtype = self._place()
        expert = Expert(
            lora_a.to(device=device, dtype=dtype),
            torch.zeros(self.out_features, rank, device=device, dtype=dtype),
            alpha=alpha,
        )
        expert.requires_grad_(trainable)
        self._put(name, expert)

    def check_unmerged(self, name: str) -> None:
        if name in self.merged:
            raise ValueError(
                f"expert {name!r} is merged into the base; expected one that is not. Call unmerge({name!r}) first."
            )

    def check_new(self, name: str) -> None:
        if (
            not isinstance(name, str) or not name or "." in name or name in self.experts._modules
            or hasattr(_EMPTY, name)
        ):  # fmt: skip
            taken = "is already an expert here" if name in self.experts._modules else "cannot name a submodule"
            raise ValueError(
                f"name={name!r} {taken}; expected a new, non-empty name without dots that is no attribute of "
                f"ModuleDict. Experts: {list(self.names)}. Choose another name or remove() the old expert first."
            )

    def _place(self) -> tuple[torch.device | str | None, torch.dtype]:
        """Where the experts are, or the layer's weight, and the dtype of experts."""
        for expert in self.experts.children():
            return expert.lora_a.device, expert.lora_a.dtype  # type: ignore[return-value]
        (like,) = self._like
        if like is None:
            return self.device, self.dtype
        weight = like.weight
        assert isinstance(weight, Tensor)
        device = weight.device
        if weight.is_meta:
            # accelerate leaves an offloaded weight on meta between calls; its hook has the device of the layer.
            device = getattr(getattr(like, "_hf_hook", None), "execution_device", device)
        return device, torch.float64 if weight.dtype == torch.float64 else torch.float32

    def _put(self, name: str, expert: Expert) -> None:
        expert.train(self.training)
        self.experts[name] = expert
        self._changed()

    def _changed(self) -> None:
        self._names = tuple(self.experts._modules)
        ExpertBank.changes += 1

    def expert(self, name: str) -> Expert:
        if name not in self:
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
        self.check_unmerged(name)
        del self.experts[name]
        self._changed()

    def rename(self, name: str, new: str) -> None:
        """Renames the expert; its parameters stay the same objects and its position does not change.

        Raises:
            ValueError: for an unknown name, or a new one that `add` would reject.
        """
        self.expert(name)
        self.check_unmerged(name)
        self.check_new(new)
        renamed = {new if key == name else key: expert for key, expert in self.experts.items()}
        self.experts.clear()
        self.experts.update(renamed)
        self._changed()

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    @property
    def sharded(self) -> tuple[str, ...]:
        """The experts whose parameters are, or were, DTensors."""
        return tuple(name for name, expert in self.experts._modules.items() if expert.sharded)

    def rank(self, name: str) -> int:
        return self.expert(name).rank

    def scale(self, name: str) -> float:
        return self.expert(name).scale

    def __contains__(self, name: object) -> bool:
        return name in self.experts._modules

    def __len__(self) -> int:
        return len(self.experts)

    def describe(self) -> dict[str, ExpertDescription]:
        """JSON-able {name: {rank, alpha, trainable}}, in order; the state of the bank that is not in a state_dict."""
        return {
            name: {
                "rank": self.rank(name),
                "alpha": self.expert(name).alpha,
                "trainable": self.expert(name).lora_a.requires_grad,
            }
            for name in self.names
        }

    def restore(self, description: Mapping[str, ExpertDescription]) -> None:
        """Makes the experts of the bank exactly the described ones, in their order, ready for load_state_dict.

        An existing expert with the described rank stays the same object with the same values, so an optimizer
        keeps its Parameters; the others are new and compute zero.
        """
        for name in self.names:
            if name not in description or self.rank(name) != description[name]["rank"]:
                self.remove(name)
        # A separate generator: restoring must not advance the default one, whose state a resume has just set.
        generator = torch.Generator()
        for name, entry in description.items():
            if name not in self:
                self.add(name, entry["rank"], alpha=entry["alpha"], generator=generator)
            expert = self.expert(name)
            expert.alpha = entry["alpha"]
            expert.requires_grad_(entry["trainable"])
        ordered = {name: self.experts[name] for name in description}
        self.experts.clear()
        self.experts.update(ordered)
        self._changed()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertBank:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.device = fn(torch.empty(0, device=self.device)).device
        return self


_EMPTY = nn.ModuleDict()
