# SPDX-License-Identifier: Apache-2.0
"""
    choose_backend(requested, device_type, dtype, decode_rows) -> (name, reason)

Which implementation runs an op: a pure function of its arguments and of `use_backend`, whose answer and reason can be
printed (`python -m dmole_kernels`). What is asked for and does not exist is an error, never a silent replacement.

A backend enters here by name in `BACKENDS` and in the table of kernels of each op file; nothing else chooses.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from dmole_kernels import _cuda_decode as cuda_decode
from dmole_kernels import cpu, cuda, triton_backend
from dmole_kernels._argument_checks import dtype_name

# Name -> device types it serves; None means any device PyTorch serves. Fastest first: "auto" takes the first that fits.
BACKENDS: dict[str, tuple[str, ...] | None] = {
    **({"cpu": ("cpu",)} if cpu.EXTENSION is not None else {}),
    **({"triton": ("cuda",)} if triton_backend.available() else {}),
    "reference": None,
    # Behind the reference, since it has a decode step and nothing else: "auto" takes it where `cuda_decode` says so.
    **({"cuda": ("cuda",)} if not cuda.MISSING else {}),
}
# Name -> dtypes it computes in; None means any.
DTYPES: dict[str, tuple[torch.dtype, ...] | None] = {
    "cpu": cpu.DTYPES,
    "reference": None,
    "triton": (torch.float16, torch.bfloat16, torch.float32),
    "cuda": cuda.DTYPES,
}

# What "auto" means, innermost block last. A list, not a ContextVar: torch.compile cannot trace one of those.
_ambient: list[str] = ["auto"]


@dataclass(frozen=True, kw_only=True)
class BackendChoice:
    name: str
    reason: str


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """What "auto" means inside the block, in all threads: a backend's name. An op's own `backend` goes before it.

    Raises:
        ValueError: for a name that is not in this build.
    """
    _check_name(name)
    _ambient.append(name)
    try:
        yield
    finally:
        _ambient.pop()


def choose_backend(
    requested: str = "auto",
    device_type: str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    decode_rows: int | None = None,
) -> BackendChoice:
    """The backend for tensors on `device_type`, computing in `dtype` (None: one that every backend has).

    Args:
        decode_rows: rows of a call of multi_lora without dropout or derivative; None for any other call.

    Raises:
        ValueError: for a name that is not available there.
    """
    reason = "asked for by name"
    if requested == "auto":
        requested = _ambient[-1]
        reason = "asked for by use_backend"
    if requested == "auto":
        return _measured_decode(device_type, dtype, decode_rows) or _first_that_serves(device_type, dtype)
    _check_name(requested)
    devices, dtypes = BACKENDS[requested], DTYPES[requested]
    if devices is not None and device_type not in devices:
        raise ValueError(
            f"backend={requested!r} got a tensor on {device_type!r}; expected {', '.join(devices)}. "
            f"Move the tensors or pass backend='auto'."
        )
    if dtypes is not None and dtype is not None and dtype not in dtypes:
        raise ValueError(
            f"backend={requested!r} got {dtype_name(dtype)}; expected {' or '.join(map(dtype_name, dtypes))}. "
            f"Cast the tensors or pass backend='reference'."
        )
    return BackendChoice(name=requested, reason=reason)


def _measured_decode(device_type: str, dtype: torch.dtype | None, decode_rows: int | None) -> BackendChoice | None:
    """The choice of "cuda" where the table says that it was measured faster for so few rows; else None."""
    if not cuda_decode.FASTER_UP_TO or "cuda" not in BACKENDS or device_type != "cuda" or decode_rows is None:
        return None
    if (dtype is not None and dtype not in cuda.DTYPES) or _gpu_refusal():
        return None
    target = cuda_decode.this_target()
    rows = cuda_decode.largest_rows(target)
    if decode_rows > rows:
        return None
    return BackendChoice(
        name="cuda", reason=f"measured faster for up to {rows} rows on {target}, {cuda_decode.MEASURED_ON}"
    )


def _first_that_serves(device_type: str, dtype: torch.dtype | None) -> BackendChoice:
    passed_over = "" if cpu.EXTENSION is not None else f"; 'cpu' is not built: {cpu.MISSING}"
    for name, devices in BACKENDS.items():
        dtypes = DTYPES[name]
        if devices is not None and device_type not in devices:
            continue
        if dtypes is not None and dtype is not None and dtype not in dtypes:
            passed_over = f"; {name!r} computes in {' or '.join(map(dtype_name, dtypes))}, not {dtype_name(dtype)}"
            continue
        if name == "triton" and (refusal := _gpu_refusal()):
            passed_over = f"; for 'triton' {refusal}"
            continue
        reason = f"the first of {tuple(BACKENDS)} that serves {device_type}{passed_over}"
        return BackendChoice(name=name, reason=reason)
    raise AssertionError("the reference serves every device")


def _gpu_refusal() -> str:
    """What the table of Triton's launch configurations says against this GPU; "" while none is in use."""
    # Under torch.compile the device is not asked: a trace shall not depend on it.
    compiling = torch.compiler.is_compiling()
    if compiling or torch.version.hip or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return ""
    try:
        cuda_decode.this_target()
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
    """What would run here and why, with what this machine offers, in a few lines."""
    choice = choose_backend(requested)
    lines = [
        f"backend   {choice.name} ({choice.reason})",
        f"built     {', '.join(BACKENDS)}",
        *([f"missing   'cuda': {cuda.MISSING}"] if cuda.MISSING else []),
        f"decode    {_decode_sentence()}",
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


def _decode_sentence() -> str:
    measured = ", ".join(f"{rows} rows on {target}" for target, rows in cuda_decode.FASTER_UP_TO.items())
    if not measured:
        return f"'auto' never takes 'cuda': not measured on a GPU as of {cuda_decode.MEASURED_ON}"
    return f"'auto' takes 'cuda' for up to {measured}, measured {cuda_decode.MEASURED_ON}"


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """For the inside of a kernel, which has settled its dtypes; costs nothing where autocast is off."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
