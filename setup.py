# SPDX-License-Identifier: Apache-2.0
"""Builds `dmole_kernels._C`, the compiled CPU kernels; everything else about the package is in pyproject.toml.

    pip install torch && pip install --no-build-isolation .      with the kernels (ninja, if there, builds in parallel)
    pip install .                                                without, unless the isolated build finds torch

DMOLE_KERNELS_BUILD: "auto" (default) builds where torch and a C++ compiler are there and goes on without them, saying
why; "require" makes that an error; "skip" builds nothing.
DMOLE_KERNELS_SANITIZE=1 adds the address and undefined-behaviour sanitizers (scripts/sanitize.py builds and runs it).
"""

from __future__ import annotations

import os
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


def say(text: str) -> None:
    print(f"dmole_kernels: {text}", file=sys.stderr, flush=True)


def extension() -> dict[str, Any]:
    """`setup` arguments of the extension, or {} with the reason said."""
    if MODE not in ("auto", "require", "skip"):
        raise SystemExit(f"DMOLE_KERNELS_BUILD is {MODE!r}; expected 'auto', 'require' or 'skip'.")
    if MODE == "skip":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        if MODE == "require":
            raise
        say(f"built without the compiled CPU kernels ({error}); install torch, then use pip --no-build-isolation")
        return {}
    sanitize = SANITIZE if os.environ.get("DMOLE_KERNELS_SANITIZE") == "1" else []

    class Build(BuildExtension):  # type: ignore[misc, valid-type]
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if MODE == "require":
                    raise
                say(f"built without the compiled CPU kernels (the compiler failed: {error})")
                self.extensions = []

    # No -march: each instruction set has its own file, which says for itself what it may use, chosen at run time.
    # No -ffast-math and no contraction across statements: results are the same on every build.
    extension = CppExtension(
        name="dmole_kernels._C",
        sources=["csrc/ops.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))],
        include_dirs=[str(Path(__file__).parent / "csrc")],
        extra_compile_args=["-std=c++17", "-O3", "-g0", "-Wall", *QUIET, "-ffp-contract=off", *sanitize],
        extra_link_args=sanitize,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(**extension())
