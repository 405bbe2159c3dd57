# SPDX-License-Identifier: Apache-2.0
"""One call a torch op: its schema, kernel, fake implementation and, where it has them, its derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dmole_kernels._transforms import transformable

_LIBRARY = torch.library.Library("dmole_kernels", "DEF")  # type: ignore[no-untyped-call]


def register_op(
    schema: str,
    *,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    jvp: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Defines `torch.ops.dmole_kernels.<name of the schema>`; one kernel serves all devices (it picks the backend).

    Returns the op as a function that works under torch.func, too; `jvp` as `transformable` takes it.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"dmole_kernels::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"dmole_kernels::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    overload = getattr(torch.ops.dmole_kernels, name).default
    return transformable(overload, backward, setup_context, jvp)
