# SPDX-License-Identifier: Apache-2.0
"""
    Op.choose(requested, device_type, dtype) -> (name, reason)

Selects the implementation of an op. Each op has its own table of kernels, so `name` is the one that runs; requesting a
backend without a kernel for this op, device or dtype is an error, and nothing is substituted silently.
`python -m dmole_kernels` prints the answers and their reasons.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from dmole_kernels import cpu, cuda, triton_backend
from dmole_kernels._ambient import Ambient, AmbientBlock
from dmole_kernels._argument_checks import dtype_name

# Name -> supported device types; None means any device of PyTorch. "auto" uses the first with a kernel for the op.
BACKENDS: dict[str, tuple[str, ...] | None] = {
    **({"cpu": ("cpu",)} if cpu.EXTENSION is not None else {}),
    **({"triton": ("cuda",)} if triton_backend.available() else {}),
    "reference": None,
    # After the reference, so that "auto" never selects it: it has a decode step only and was never measured on a GPU.
    **({"cuda": ("cuda",)} if not cuda.MISSING else {}),
}
# Name -> supported dtypes; None means any.
DTYPES: dict[str, tuple[torch.dtype, ...] | None] = {
    "cpu": cpu.DTYPES,
    "reference": None,
    "triton": (torch.float16, torch.bfloat16, torch.float32),
    "cuda": cuda.DTYPES,
}


@dataclass(frozen=True, kw_only=True)
class BackendChoice:
    name: str
    reason: str


class _BackendBlock(AmbientBlock):
    __slots__ = ("backend",)

    def __init__(self, backend: str) -> None:
        super().__init__("backend")
        self.backend = backend

    def __enter__(self) -> None:
        _ambient.enter(self, sys._getframe(1))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _ambient.leave(self)


_ambient: Ambient[_BackendBlock] = Ambient("use_backend", strict=False)


def use_backend(name: str) -> AbstractContextManager[None]:
    """Sets the backend that "auto" means inside the `with` block, in this thread, asyncio task or generator.

    An op's own `backend` argument takes precedence.

    Raises:
        ValueError: for a name that is not in this build; when blocks are left in another order than the reverse one.
    """
    _ambient.refuse_in_graphs()
    _check_name(name)
    return _BackendBlock(name)


class Op:
    """One op and its kernels by backend.

    Args:
        name: as in `torch.ops.dmole_kernels.<name>`.
        kernels: backend -> kernel. The table is read at every call, so kernels can be added later.
    """

    by_name: dict[str, Op] = {}

    def __init__(self, name: str, kernels: Mapping[str, Any]) -> None:
        self.name = name
        self.kernels = kernels
        Op.by_name[name] = self

    def asked(self, requested: str) -> str:
        """`requested`, or the backend of `use_backend` in place of "auto"."""
        if requested == "auto" and (block := _ambient.innermost("backend")) is not None:
            return block.backend
        return requested

    def pick(self, requested: str, device_type: str, dtype: torch.dtype | None) -> str:
        """The name of the backend that runs this op. Raises ValueError when the requested one cannot."""
        if requested == "auto":
            block = _ambient.innermost("backend")
            if block is None or block.backend == "auto":
                return self._first_that_fits(device_type, dtype)
            requested = block.backend
        self._check(requested, device_type, dtype)
        return requested

    def choose(self, requested: str, device_type: str, dtype: torch.dtype | None) -> BackendChoice:
        """As `pick`, with the reason."""
        name = self.pick(requested, device_type, dtype)
        if requested != "auto":
            reason = "asked for by name"
        elif self.asked(requested) != "auto":
            reason = "asked for by use_backend"
        else:
            reason = f"the first of {tuple(BACKENDS)} with a kernel for {device_type}"
            reason += "".join(f"; {text}" for other in BACKENDS if (text := self._unfit(other, device_type, dtype)))
            if cpu.EXTENSION is None:
                reason += f"; 'cpu' is not built: {cpu.MISSING}"
        return BackendChoice(name=name, reason=reason)

    def _first_that_fits(self, device_type: str, dtype: torch.dtype | None) -> str:
        for name, devices in BACKENDS.items():
            if name in self.kernels and (devices is None or device_type in devices):
                dtypes = DTYPES[name]
                fits = dtypes is None or dtype is None or dtype in dtypes
                if fits and not (name == "triton" and _gpu_refusal()):
                    return name
        raise AssertionError("the reference has a kernel for every op on every device")

    def _unfit(self, name: str, device_type: str, dtype: torch.dtype | None) -> str:
        """Why "auto" does not use a backend that supports this device; "" for the others."""
        devices, dtypes = BACKENDS[name], DTYPES[name]
        if devices is None or device_type not in devices or name == "cuda":
            return ""
        if name not in self.kernels:
            return f"{name!r} has no {self.name}"
        if dtypes is not None and dtype is not None and dtype not in dtypes:
            return f"{name!r} computes in {' or '.join(map(dtype_name, dtypes))}, not {dtype_name(dtype)}"
        refusal = _gpu_refusal() if name == "triton" else ""
        return f"for 'triton' {refusal}" if refusal else ""

    def _check(self, name: str, device_type: str, dtype: torch.dtype | None) -> None:
        _check_name(name)
        if name not in self.kernels:
            have = ", ".join(repr(other) for other in BACKENDS if other in self.kernels)
            raise ValueError(
                f"backend={name!r} has no kernel for {self.name}; expected 'auto' or one of {have}. Pass one of these "
                f"for this op."
            )
        devices, dtypes = BACKENDS[name], DTYPES[name]
        if devices is not None and device_type not in devices:
            raise ValueError(
                f"backend={name!r} got a tensor on {device_type!r}; expected {', '.join(devices)}. "
                f"Move the tensors or pass backend='auto'."
            )
        if dtypes is not None and dtype is not None and dtype not in dtypes:
            raise ValueError(
                f"backend={name!r} got {dtype_name(dtype)}; expected {' or '.join(map(dtype_name, dtypes))}. "
                f"Cast the tensors or pass backend='reference'."
            )


def choose_backend(
    requested: str = "auto", device_type: str = "cpu", dtype: torch.dtype | None = None, *, op: str = "multi_lora"
) -> BackendChoice:
    """The backend that runs `op` on `device_type`, computing in `dtype` (None: one that every backend has), and why.

    Raises:
        ValueError: for an op that does not exist, or a backend that is not available for it there.
    """
    if op not in Op.by_name:
        raise ValueError(f"op={op!r}; expected one of {', '.join(Op.by_name)}. Pass the name of an op.")
    return Op.by_name[op].choose(requested, device_type, dtype)


def _gpu_refusal() -> str:
    """The reason that Triton's table of launch configurations lacks this GPU; "" otherwise or while none is in use."""
    # Not checked under torch.compile: a trace must not depend on the device.
    compiling = torch.compiler.is_compiling()
    if compiling or torch.version.hip or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return ""
    from dmole_kernels.triton_backend.configs import target_of_capability

    try:
        target_of_capability(*torch.cuda.get_device_capability())
    except ValueError as error:
        return str(error)
    return ""


def _check_name(name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        missing = {"cpu": cpu.MISSING, "triton": "Triton is not installed", "cuda": cuda.MISSING}.get(name, "")
        raise ValueError(
            f"backend={name!r} is not in this build of dmole_kernels{f' ({missing})' if missing else ''}; expected "
            f"'auto' or one of {', '.join(map(repr, BACKENDS))}. Pass backend='auto' or backend='reference'."
        )


def explain_backend(requested: str = "auto") -> str:
    """A few lines: the backend of each op on this machine and the reason, versions and hardware."""
    choices: dict[BackendChoice, list[str]] = {}
    for op in Op.by_name.values():
        if requested == "auto" or requested in op.kernels:
            choices.setdefault(op.choose(requested, "cpu", None), []).append(op.name)
    width = max(len(choice.name) for choice in choices)
    lines = [
        *(f"backend   {c.name:{width}}  {', '.join(ops)}: {c.reason}" for c, ops in choices.items()),
        f"built     {', '.join(BACKENDS)}",
        *([f"missing   'cuda': {cuda.MISSING}"] if cuda.MISSING else []),
        f"torch     {torch.__version__}, {torch.get_num_threads()} thread(s)",
        f"cpu       {platform.machine()}, {torch.backends.cpu.get_cpu_capability()} kernels in PyTorch",
    ]
    if cpu.EXTENSION is not None:
        built = cpu.build_info()
        lines += [
            f"linear    {cpu.explain_linear()}",
            f"isa       {cpu.isa()} of {', '.join(cpu.available_isas())} (DMOLE_KERNELS_ISA chooses)",
            f"compiler  {built['compiler']}, C++ {built['cxx']}, for torch {built['torch']}, {built['threads']}",
        ]
    if torch.cuda.is_available():
        lines.append(
            f"cuda      {torch.cuda.get_device_name()}, {choose_backend(requested, 'cuda').name} would run on it"
        )
    else:
        lines.append("cuda      no device")
    return "\n".join(lines)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Disables autocast inside a kernel, whose dtypes are already chosen; costs nothing where autocast is off."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
