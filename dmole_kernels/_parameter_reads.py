# SPDX-License-Identifier: Apache-2.0
"""Uses of a linear's parameters outside its forward: there, the gradient of the parameter has further terms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Functions that give a tensor but pass no gradient to the parameter: they read its shape, dtype or device only, or cut
# the graph.
_WITHOUT_GRADIENT: frozenset[Any] = frozenset(
    (
        Tensor.detach, Tensor.detach_, Tensor.requires_grad_, Tensor.__deepcopy__,
        *(vars(torch._C.TensorBase)[name].__get__ for name in ("data", "grad")),
        torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, torch.rand_like, torch.randn_like,
        Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor,
    )
)  # fmt: skip
# Functions that read only the shape, dtype or device of every argument after the first.
_LIKE_THE_SECOND: frozenset[Any] = frozenset(
    (Tensor.to, Tensor.type_as, Tensor.view_as, Tensor.expand_as, Tensor.reshape_as)
)


class ParameterReads(TorchFunctionMode):
    """Raises ValueError where a PyTorch function uses a parameter of `linears` while its layer is not running.

    `running` holds the names of the layers whose forward is running. Calls with gradients disabled are ignored.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], running: set[str]) -> None:
        super().__init__()
        self.running = running
        # The parameters too: their ids are theirs only as long as they live.
        self.owners = {
            id(parameter): (name, side, parameter)
            for name, linear in linears.items()
            for side, parameter in linear.named_parameters(recurse=False)
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _WITHOUT_GRADIENT or not torch.is_grad_enabled() or not _is_differentiable(result):
            return result
        for argument in _tensors(args[:1] if func in _LIKE_THE_SECOND else (*args, *(kwargs or {}).values())):
            name, side, _ = self.owners.get(id(argument), ("", "", argument))
            if name and name not in self.running:
                raise ValueError(
                    f"the {side} of {name!r} is used by {getattr(func, '__name__', func)} outside the forward of its "
                    f"layer; expected the layer alone to use it, since the gradient there would be missing from its "
                    f"norm. Call the layer instead, use {side}.detach() where no gradient is meant, or leave "
                    f"{name!r} out."
                )
        return result


def _is_differentiable(result: Any) -> bool:
    if isinstance(result, (tuple, list)):
        return any(map(_is_differentiable, result))
    return isinstance(result, Tensor) and (result.is_floating_point() or result.is_complex())


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def check_not_shared(linears: Mapping[str, nn.Linear], model: nn.Module | None) -> None:
    """Raises ValueError where two linears share a parameter, or another module of `model` holds one of theirs."""
    owners: dict[int, tuple[str, str, nn.Module]] = {}
    for name, linear in linears.items():
        for side, parameter in linear.named_parameters(recurse=False):
            first, _, _ = owners.setdefault(id(parameter), (name, side, linear))
            if first != name:
                raise ValueError(
                    f"linears {first!r} and {name!r} share one {side}; expected distinct parameters. Leave one of them "
                    f"out: the gradient of a tied parameter is the sum over both places, which neither alone has."
                )
    if model is None:
        return
    modules = dict(model.named_modules())
    present = set(map(id, modules.values()))
    for name, linear in linears.items():
        if id(linear) not in present:
            raise ValueError(f"linear {name!r} is not a module of model; expected one. Take both from one model.")
    for place, module in modules.items():
        for own, parameter in module.named_parameters(recurse=False):
            name, side, owner = owners.get(id(parameter), ("", "", module))
            if owner is not module:
                raise ValueError(
                    f"the {side} of {name!r} is also {f'{place}.{own}' if place else own!s} of model; expected a "
                    f"parameter of one module. Leave {name!r} out: the gradient of a tied parameter is the sum over "
                    f"both places."
                )
