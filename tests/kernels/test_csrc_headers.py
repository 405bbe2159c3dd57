# SPDX-License-Identifier: Apache-2.0
"""Every header of csrc parses alone, and an op has the same name from csrc to its tests."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
PER_ISA = CSRC / "cpu" / "per_isa"
HEADERS = sorted(CSRC.rglob("*.h"))
INCLUDE = re.compile(r"^#include [<\"](.+)[>\"]$", re.M)
NEEDS_X86 = {"simd_avx2.h", "simd_avx512.h", "simd_sums.h"}
# Name of the op in dmole_kernels -> its other files. Norms have no kernels of their own for an instruction set.
OPS = {
    "multi_lora": ["cpu/multi_lora.h", "cpu/per_isa/multi_lora_forward.h", "cpu/per_isa/multi_lora_backward.h"],
    "frozen_linear": ["cpu/frozen_linear.h", "cpu/per_isa/frozen_linear.h"],
    "grad_norm": ["cpu/grad_norm.h", "cpu/grad_norm.cpp"],
    "router_score": ["cpu/router_score.h", "cpu/router_score.cpp"],
    "masked_pool": [],
}


def included(header: Path) -> set[str]:
    return set(INCLUDE.findall(header.read_text(encoding="utf-8")))


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.parametrize("header", HEADERS, ids=lambda header: str(header.relative_to(CSRC)))
def test_a_header_parses_alone(header: Path) -> None:
    """Without a flag but for torch's headers, where they are included."""
    if header.name in NEEDS_X86 and platform.machine() != "x86_64":
        pytest.skip("registers of another machine")
    # Registers get their target from the file that includes them: alone, GCC warns of how it would pass them.
    command = ["g++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-x", "c++"]
    if "ATen" in header.read_text(encoding="utf-8"):
        folders = [*include_paths(), sysconfig.get_paths()["include"]]
        command += [flag for folder in folders for flag in ("-isystem", folder)]
    command += ["-include", str(header), "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_there_are_no_other_kinds_of_headers() -> None:
    assert not sorted(CSRC.rglob("*.inl"))
    assert all("#pragma once" in header.read_text(encoding="utf-8") for header in HEADERS)


def test_what_kernels_include_from_outside_is_included_before_the_target_changes() -> None:
    """Else a function of the standard library, compiled for AVX-512, could be linked into code for every machine."""
    before = included(PER_ISA / "before_target.h")
    for header in sorted(PER_ISA.glob("*.h")):
        outside = {name for name in included(header) if "/" in name or not (PER_ISA / name).exists()}
        assert outside <= before, f"{header.name}: {outside - before} is not in before_target.h"
    for source in sorted(PER_ISA.glob("*.cpp")):
        first = INCLUDE.search(source.read_text(encoding="utf-8"))
        assert first is not None
        assert first[1] in ("before_target.h", "avx512_bf16.h")
    assert INCLUDE.findall((PER_ISA / "avx512_bf16.h").read_text(encoding="utf-8"))[0] == "before_target.h"


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_one_name_from_csrc_to_its_tests(op: str) -> None:
    files = [
        *(CSRC / name for name in OPS[op]),
        *(CSRC / "cpu" / f"{op}_op{suffix}" for suffix in (".h", ".cpp")),
        ROOT / "dmole_kernels" / f"_{op}.py",
        ROOT / "tests" / "kernels" / f"test_{op}.py",
    ]
    assert [str(file) for file in files if not file.exists()] == []


def test_no_file_of_an_op_has_a_name_of_its_own() -> None:
    """`gemm` is the product that several ops share; a row map is made once for many calls of multi_lora."""
    shared = {"gemm", "row_map"}
    assert {path.name.removesuffix("_op.cpp") for path in CSRC.glob("cpu/*_op.cpp")} == set(OPS) | shared
    tests = {path.stem.removeprefix("test_cpu_") for path in (ROOT / "tests" / "kernels").glob("test_cpu_*.py")}
    allowed = set(OPS) | {"gemm", "bounds"}
    assert {name for name in tests if not any(name == op or name.startswith(f"{op}_") for op in allowed)} == set()
