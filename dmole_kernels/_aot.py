# SPDX-License-Identifier: Apache-2.0
"""
    python -m dmole_kernels check-aot [--quick] [--write]

Compiles every (kernel, configuration) of the Triton backend for every target of its table, without a GPU, with the
types and divisibility that Triton's launcher derives from the launch, and compares the compilers' reports with
`triton_backend/aot.json`: registers, spills, shared memory, tensor-core instructions. `--quick` compiles for one
target; `--write` replaces the file, after an intended change. With another version of Triton than the file's only the
limits are checked: no spills, shared memory within the target's, tensor cores where 16-bit operands are multiplied.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parent / "triton_backend" / "aot.json"
QUICK_TARGET = "sm_90"
TENSOR_CORES = {
    "tcgen05": r"\btcgen05\.mma\b",
    "wgmma": r"\bwgmma\.mma_async\b",
    "mma.sync": r"\bmma\.sync\b",
    "mfma": r"\bv_mfma_",
}
Entry = dict[str, Any]


def check_aot(arguments: Sequence[str] = ()) -> int:
    """Runs the check and prints what differs; 0 when nothing does."""
    unknown = [a for a in arguments if a not in ("--quick", "--write")]
    if unknown or {"--quick", "--write"} <= set(arguments):
        raise ValueError(f"check-aot got {list(arguments)}; expected nothing, --quick or --write. Drop the others.")
    from dmole_kernels import triton_backend

    if not triton_backend.available():
        raise ValueError(triton_backend.MISSING)
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]

    _check_version(triton.__version__)

    from dmole_kernels.triton_backend.configs import TARGETS

    targets = (QUICK_TARGET,) if "--quick" in arguments else TARGETS
    entries = {}
    for target in targets:
        entries.update(compile_target(target))
        print(f"{target}: {sum(key.startswith(target + ' ') for key in entries)} kernels compiled", flush=True)
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    # The number of spilled registers varies with the version of the compiler, by a few bytes for some float32 kernels.
    spills = "--write" in arguments or recorded["triton"] == triton.__version__
    problems = [problem for key, entry in entries.items() for problem in broken_limits(key, entry, spills=spills)]
    if "--write" in arguments:
        record = {"triton": triton.__version__, "kernels": entries}
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    else:
        problems += differences(entries, recorded, triton.__version__, targets)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"check-aot: {len(entries)} kernels, {len(problems)} problems")
    return 1 if problems else 0


def _check_version(version: str) -> None:
    """Raises ValueError for a Triton without the functions of its compiler that `_bound` calls."""
    if tuple(map(int, version.split(".")[:2])) < (3, 5):
        raise ValueError(
            f"check-aot got triton {version}; expected 3.5 or newer. Install a newer torch, which pins a newer triton."
        )


def differences(entries: dict[str, Entry], record: Entry, version: str, targets: Sequence[str]) -> list[str]:
    """Readable lines where the compiled kernels are not the recorded ones."""
    if record["triton"] != version:
        print(f"the record is of triton {record['triton']}, this is {version}: only hard limits count, not spills")
        return []
    recorded = {key: entry for key, entry in record["kernels"].items() if key.split(" ")[0] in targets}
    again = "Run check-aot --write if the change is meant."
    lines = [f"{key}: not compiled any more. {again}" for key in recorded.keys() - entries.keys()]
    lines += [f"{key}: not in the record. {again}" for key in entries.keys() - recorded.keys()]
    for key in sorted(entries.keys() & recorded.keys()):
        if entries[key] != recorded[key]:
            lines.append(f"{key}: got {entries[key]}, expected {recorded[key]}. {again}")
    return lines


def broken_limits(key: str, entry: Entry, *, spills: bool = True) -> Iterator[str]:
    """Readable lines: limits that a compiled kernel breaks; `spills`: whether spilled registers count."""
    from dmole_kernels.triton_backend.configs import SHARED_MEMORY

    limit = SHARED_MEMORY[key.split(" ")[0]]
    remedy = "Take smaller tiles or fewer stages in triton_backend/configs.py."
    if spills and entry["spills"]:
        yield f"{key}: {entry['spills']} bytes or registers spilled; expected none. {remedy}"
    if entry["shared"] > limit:
        yield f"{key}: {entry['shared']} bytes of shared memory; expected at most {limit}. {remedy}"
    if entry["wants_tensor_cores"] and not entry["tensor_cores"]:
        yield f"{key}: no tensor-core instruction; expected one of {', '.join(TENSOR_CORES)}. {remedy}"


def compile_target(target: str) -> dict[str, Entry]:
    """Every distinct launch of the cases, compiled: "target kernel | case" -> its entry of the record."""
    workers = os.cpu_count() or 1
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        slices = pool.map(compile_slice, *zip(*((target, worker, workers) for worker in range(workers)), strict=True))
        return {key: entry for entries in slices for key, entry in entries.items()}


def compile_slice(target: str, worker: int, workers: int) -> dict[str, Entry]:
    """What one process of `compile_target` compiles: every `workers`-th distinct launch."""
    from dmole_kernels.triton_backend.cases import every_launch
    from dmole_kernels.triton_backend.launch import Launch, interpreting

    if interpreting():
        raise ValueError("TRITON_INTERPRET is set; expected compiled kernels. Unset it for check-aot.")
    distinct: dict[str, tuple[str, Launch, Any, dict[str, Any]]] = {}
    names: set[str] = set()
    for name, launch in every_launch(target):
        source, options, mark = _bound(launch, target)
        if mark not in distinct:
            key = f"{target} {launch.name} | {name}"
            # Two launches of one kernel in one case differ in dtype alone.
            key += " (2)" if key in names else ""
            names.add(key)
            distinct[mark] = (key, launch, source, options)
    chosen = list(distinct.values())[worker::workers]
    return {key: _compiled(launch, source, options, target) for key, launch, source, options in chosen}


def _gpu_target(target: str) -> Any:
    from triton.backends.compiler import GPUTarget  # type: ignore[import-not-found, import-untyped, unused-ignore]

    return GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)


def _bound(launch: Any, target: str) -> tuple[Any, dict[str, Any], str]:
    """What Triton's launcher would compile for this launch: source and options, and a mark that identifies them."""
    from triton.compiler import ASTSource, make_backend  # type: ignore[import-not-found, import-untyped, unused-ignore]
    from triton.runtime.jit import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        create_function_from_signature,
    )

    kernel = launch.kernel
    backend = make_backend(_gpu_target(target))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    given = {"num_warps": launch.config.warps, "num_stages": launch.config.stages}
    bound, specialization, keywords = binder(**launch.arguments, **launch.constants, **given)
    options, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, keywords)
    mark = f"{kernel.__name__} {signature} {sorted(constants.items(), key=str)} {sorted(attributes.items())} {given}"
    return ASTSource(kernel, signature, constants, attributes), options.__dict__, mark


def _compiled(launch: Any, source: Any, options: dict[str, Any], target: str) -> Entry:
    import triton

    kernel = triton.compile(source, target=_gpu_target(target), options=options)
    if target.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        registers, spills = (
            int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1]) for name in ("vgpr_count", "vgpr_spill_count")
        )
    else:
        text = kernel.asm["ptx"]
        registers, spills = _cubin_usage(kernel.asm["cubin"])
    return {
        "registers": registers,
        "spills": spills,
        "shared": kernel.metadata.shared,
        "tensor_cores": next((name for name, sign in TENSOR_CORES.items() if re.search(sign, text)), None),
        # float32 is multiplied in full precision, for which NVIDIA's tensor cores have no instruction.
        "wants_tensor_cores": bool(launch.dots) and launch.constants["TYPE"].primitive_bitwidth == 16,
    }


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of spilled registers a thread) as `cuobjdump -res-usage` reports."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if not found:
        raise ValueError(f"cuobjdump printed {text!r}; expected a line with REG, STACK and LOCAL. Check its version.")
    registers, stack, local = (int(number) for number in found[0])
    return registers, stack + local
