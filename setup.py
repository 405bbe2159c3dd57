# SPDX-License-Identifier: Apache-2.0
"""Builds `dmole_kernels._C`, the compiled kernels; everything else about the package is in pyproject.toml.

    pip install torch && pip install --no-build-isolation .      with the kernels (ninja, if there, builds in parallel)
    pip install .                                                without, unless the isolated build finds torch

DMOLE_KERNELS_BUILD: "auto" (default) builds where torch and a C++ compiler are there and goes on without them, saying
why; "require" makes that an error; "skip" builds nothing.
The CUDA kernels are built too where torch is a CUDA build and nvcc is there (CUDA_HOME says which), for the GPUs of
ARCHITECTURES unless TORCH_CUDA_ARCH_LIST says otherwise.
DMOLE_KERNELS_SANITIZE=1 adds the address and undefined-behaviour sanitizers (scripts/sanitize.py builds and runs it).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

MODE = os.environ.get("DMOLE_KERNELS_BUILD", "auto")
# GCC 12 sees uninitialised values in its own avx512fintrin.h.
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# -O2 after -O3: half the time to compile, and fewer accesses optimised away before they are watched. Python's own flags
# hold -fwrapv, under which signed overflow is no error.
SANITIZE = [
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-fno-wrapv", "-O2", "-g1",
]  # fmt: skip
# nvcc's name of a GPU generation -> torch's; the oldest as PTX too, which newer GPUs compile for themselves.
ARCHITECTURES = {"compute_80": "8.0+PTX", "compute_90": "9.0a", "compute_100": "10.0a"}


def say(text: str) -> None:
    print(f"dmole_kernels: {text}", file=sys.stderr, flush=True)


def sources(pattern: str) -> list[str]:
    return sorted(map(str, Path("csrc").glob(pattern)))


def extension() -> dict[str, Any]:
    """`setup` arguments of the extension, or {} with the reason said."""
    if MODE not in ("auto", "require", "skip"):
        raise SystemExit(f"DMOLE_KERNELS_BUILD is {MODE!r}; expected 'auto', 'require' or 'skip'.")
    if MODE == "skip":
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        if MODE == "require":
            raise
        say(f"built without the compiled kernels ({error}); install torch, then use pip --no-build-isolation")
        return {}
    sanitize = SANITIZE if os.environ.get("DMOLE_KERNELS_SANITIZE") == "1" else []

    class Build(BuildExtension):  # type: ignore[misc, valid-type]
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if MODE == "require":
                    raise
                say(f"built without the compiled kernels (the compiler failed: {error})")
                self.extensions = []

    nvcc = Path(CUDA_HOME or "") / "bin" / "nvcc"
    cuda = torch.version.cuda is not None and nvcc.is_file()
    if torch.version.cuda is not None and not cuda:
        say(f"built without the CUDA kernels (no {nvcc}); install CUDA {torch.version.cuda}'s nvcc and set CUDA_HOME")
    # No -march: each instruction set has its own file, which says for itself what it may use, chosen at run time.
    # No -ffast-math and no contraction across statements: results are the same on every build.
    arguments: dict[str, Any] = {
        "name": "dmole_kernels._C",
        "sources": ["csrc/ops.cpp", *sources("cpu/*.cpp"), *sources("cpu/per_isa/*.cpp")],
        "include_dirs": [str(Path(__file__).parent / "csrc")],
        "extra_link_args": sanitize,
    }
    host = ["-std=c++17", "-O3", "-g0", "-Wall", *QUIET, "-ffp-contract=off", *sanitize]
    # at::parallel_for is inline: without this it is a plain loop. The threads are torch's own, whose runtime is loaded.
    if torch.backends.openmp.is_available():
        host.append("-fopenmp")
        arguments["extra_link_args"] = [*sanitize, "-fopenmp"]
    if cuda:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
        chosen = [torch_name for name, torch_name in ARCHITECTURES.items() if name in listed]
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(chosen))
        arguments["sources"] += sources("cuda/*.cpp") + sources("cuda/*.cu")
        arguments["define_macros"] = [("DMOLE_WITH_CUDA", None)]
        compile_args = {"cxx": host, "nvcc": ["-std=c++17", "-O3", "-Werror", "all-warnings"]}
        extension = CUDAExtension(**arguments, extra_compile_args=compile_args)
    else:
        extension = CppExtension(**arguments, extra_compile_args=host)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(**extension())
