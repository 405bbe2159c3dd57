# SPDX-License-Identifier: Apache-2.0
"""
    available  <=>  the compiled extension `dmole_kernels._C` imports

The "cpu" backend: C++ kernels for float32 and bfloat16 (csrc/), reached as `torch.ops.dmole_kernels.cpu_*`. This file
is where the package learns whether they are there; the op files put them into their tables of kernels.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from dmole_kernels._lora_call import LoraCall, Wanted

DTYPES = (torch.float32, torch.bfloat16)


# What the extension must bring: one built from older sources is not used.
OPS = (
    "cpu_gemm",
    "cpu_frozen_linear",
    "cpu_multi_lora",
    "cpu_multi_lora_backward",
    "cpu_squared_norm",
    "cpu_accumulate_gradient",
    "cpu_accumulate_sketch",
    "cpu_router_score",
    "cpu_router_select",
    "cpu_masked_max_pool",
)


def _load() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("dmole_kernels._C")
    except ImportError as error:
        # Not built, or built for another Python or torch: the text says which.
        return None, str(error).partition("\n")[0]
    absent = [name for name in OPS if not hasattr(torch.ops.dmole_kernels, name)]
    return (None, f"dmole_kernels._C is of older sources, without {', '.join(absent)}") if absent else (module, "")


EXTENSION, MISSING = _load()


def extension() -> ModuleType:
    """The compiled extension. Raises RuntimeError when this installation has none."""
    if EXTENSION is None:
        raise RuntimeError(
            f"dmole_kernels._C is not there ({MISSING}); expected the compiled extension. Install torch and a C++ "
            f"compiler, then run `pip install --no-build-isolation .`, or pass backend='reference'."
        )
    return EXTENSION


def isa() -> str:
    """Instruction set the kernels use: one of available_isas()."""
    return str(extension().isa())


def available_isas() -> tuple[str, ...]:
    """Instruction sets this machine runs, slowest first."""
    return tuple(extension().available_isas())


def set_isa(name: str) -> None:
    """Chooses the instruction set, "auto" for the machine's best; DMOLE_KERNELS_ISA does so from outside.

    Raises:
        ValueError: for a name this machine does not run.
    """
    extension().set_isa(name)


def build_info() -> dict[str, str]:
    """Compiler, C++ standard and torch version of the build."""
    return dict(extension().build_info())


def takes_linear(rows: int, features: int, dtype: torch.dtype, *, transposed: bool = False) -> bool:
    """Whether this backend multiplies with a frozen weight itself, or PyTorch's BLAS does; `rows` of x, each `features`
    long, `transposed` where the weight lies column by column (as it does for dx).

    2026-11-22, measured on AMD's Zen 5, torch 2.13 (benchmarks/results/linear.csv): MKL leaves AVX-512 to Intel's CPUs
    and takes about twice the time in float32; in bfloat16 oneDNN is as fast but for few rows. Nothing was measured on
    Intel's CPUs, where PyTorch's product stays. DMOLE_KERNELS_LINEAR=own or vendor chooses for all shapes.
    """
    if LINEAR != "auto":
        return LINEAR == "own"
    level = EXTENSION.isa() if EXTENSION is not None else ""
    if CPU_MAKER != "amd" or not _MKL or not level.startswith("avx512"):
        return False
    if dtype == torch.float32:
        return rows >= 8 or not transposed
    if level != "avx512_bf16":
        return False
    if transposed:
        return features < 1024 and rows <= 64
    return rows <= (64 if features <= 1024 else 16 if features <= 2048 else 8)


def explain_linear() -> str:
    """Who multiplies with the base's weight, in a line."""
    if LINEAR != "auto":
        return f"{'own kernels' if LINEAR == 'own' else 'PyTorch'} (DMOLE_KERNELS_LINEAR={LINEAR})"
    if takes_linear(2048, 2048, torch.float32):
        return "own kernels for float32 and for few rows of bfloat16, else PyTorch (measured on AMD's AVX-512)"
    return "PyTorch (own kernels were measured faster on AMD's CPUs with AVX-512 only)"


def _asked_linear() -> str:
    asked = os.environ.get("DMOLE_KERNELS_LINEAR", "auto")
    if asked not in ("auto", "own", "vendor"):
        raise ValueError(f"DMOLE_KERNELS_LINEAR is {asked!r}; expected 'auto', 'own' or 'vendor'. Unset it for 'auto'.")
    return asked


LINEAR = _asked_linear()
CPU_MAKER = "" if EXTENSION is None else str(EXTENSION.cpu_maker())
_MKL: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]


class RowMap:
    """Which rows use each expert of a gate, found once and shared by all layers that see this gate.

    Args:
        gate: [gates, experts], each gate covering `rows / gates` consecutive rows.
        rows: rows of x, all leading dimensions together.
    """

    def __init__(self, gate: Tensor, rows: int) -> None:
        self._map = extension().RowMap(gate.detach(), rows)
        self.table: Tensor = self._map.table  # int32, what the kernels read
        self.rows = rows

    @property
    def pairs(self) -> int:
        """How many pairs of row and expert have a gate that is not zero."""
        return int(self._map.pairs)

    def rows_of(self, expert: int) -> list[int]:
        """The rows whose gate for this expert is not zero."""
        return list(self._map.rows_of(expert))

    def experts_of(self, begin: int, end: int) -> list[int]:
        """The experts that rows [begin, end) use."""
        return list(self._map.experts_of(begin, end))


def multi_lora_forward(call: LoraCall) -> tuple[Tensor, Tensor]:
    """As `reference.multi_lora_forward`; without `every_column`, S is zero where the gate is."""
    y, shrunk = torch.ops.dmole_kernels.cpu_multi_lora.default(
        call.x, call.base, call.lora_a, call.lora_b, call.gate, call.scale, call.dropout, call.per_expert, call.seed,
        call.every_column, call.row_map,
    )  # fmt: skip
    return y, shrunk


def multi_lora_backward(
    call: LoraCall, grad: Tensor, s_NR: Tensor | None, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.multi_lora_backward`."""
    dx, da, db, dgate = torch.ops.dmole_kernels.cpu_multi_lora_backward.default(
        grad, call.x, s_NR, call.lora_a, call.lora_b, call.gate, call.scale, call.dropout, call.per_expert, call.seed,
        wanted.x, wanted.gate, wanted.experts, call.row_map,
    )  # fmt: skip
    if da.dim() == 1 and any(wanted.experts):  # All of them have rank zero.
        da, db = da.new_empty((0, call.lora_a[0].shape[1])), db.new_empty((0, call.outputs))
    return dx, da, db, dgate
