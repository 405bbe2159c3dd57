# SPDX-License-Identifier: Apache-2.0
"""One call per torch op: its schema, its kernel, its fake implementation and, where it has one, its derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("dmole_kernels", "DEF")  # type: ignore[no-untyped-call]


def register_op(
    schema: str,
    *,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Defines `torch.ops.dmole_kernels.<name of the schema>` and returns it; one kernel serves all devices.

    Without a `backward`, what the op returns has a derivative that raises NotImplementedError.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"dmole_kernels::{name}", fake, lib=_LIBRARY)
    if backward is None and not schema.endswith("-> ()"):
        backward = _no_derivative(name)
    if backward is not None:
        torch.library.register_autograd(f"dmole_kernels::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    overload: Callable[..., Any] = getattr(torch.ops.dmole_kernels, name).default
    return overload


def _no_derivative(name: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"dmole_kernels.{name} has no derivative; expected first derivatives of the public ops. Write the formula "
            f"in plain PyTorch where you need second ones."
        )

    return refuse


def refuse_transforms(op: str) -> None:
    """Raises NotImplementedError under torch.func and in forward mode, which a registered op would leave without a
    derivative or with a silent tangent of zero."""
    if torch._C._are_functorch_transforms_active() or (
        forward_ad._current_level >= 0 and not torch.compiler.is_compiling()
    ):
        raise NotImplementedError(
            f"{op} is under a torch.func transform or in forward-mode differentiation; expected plain autograd. "
            f"Differentiate with backward() or torch.autograd.grad, or write the formula in plain PyTorch."
        )
