# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels in Triton, one file an op; tested in the interpreter, compiled ahead of time, and counted.

Importing this package does not import Triton: `kernel` gives a function that does so when it is first called.

    launch     a launch as a value: what runs, counted or compiled; cases     representative launches
    configs    the table of launch configurations; tuned.json  configurations measured on a GPU; aot.json  compiled size
    columns    the expert of each packed column, as a table on the device
    dropout    the mask of `philox.py`; shrink, expand, weight_gradient, finish   the kernels of multi_lora
    recompute  the elements of a tile that are NaN because of an inf or NaN of an unused expert
    norms, router   the kernels of the gradient norms and of the router; tiles      functions shared by all kernels
    multi_lora, grad_norm, router_score   the ops, with the signatures of `reference`
    fused_base      an experiment: the base product in the same launch (`dmole_kernels._fused_linear`)
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

VERSIONS = ">=3.2,<3.10"
"""Releases of Triton that the kernels were run with; the extra `triton` of pyproject.toml requires the same."""

MISSING = f"Triton is not installed; expected triton{VERSIONS}. Run pip install 'triton{VERSIONS}'."
"""The error of every command that needs Triton."""


def available() -> bool:
    """Whether Triton is installed; the dispatch checks whether there is a GPU."""
    return find_spec("triton") is not None


def kernel(module: str, name: str) -> Callable[..., Any]:
    """The function `name` of `dmole_kernels.triton_backend.<module>`, imported at its first call."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        return getattr(import_module(f"dmole_kernels.triton_backend.{module}"), name)(*arguments, **keywords)

    return call
