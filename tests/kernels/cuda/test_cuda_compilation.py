# SPDX-License-Identifier: Apache-2.0
"""nvcc compiles every kernel for every target, warnings as errors; the glue compiles against torch's CUDA headers."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "check_cuda.py"
CHECK = runpy.run_path(str(SCRIPT))
RECORD = json.loads(CHECK["RECORD"].read_text(encoding="utf-8"))
NEEDS_NVCC = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH: install the CUDA toolkit")
GOOD = {"registers": 48, "shared": 256, "spills": 0}


@NEEDS_NVCC
def test_nvcc_compiles_what_the_record_says() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{len(RECORD['kernels'])} kernels, 0 problems" in done.stdout


def test_the_record_has_every_kernel_for_every_target_within_the_limits() -> None:
    types = ["float, float", "__half, float", "__half, __half", "__nv_bfloat16, float", "__nv_bfloat16, __nv_bfloat16"]
    names = [f"{kernel}<{pair}>" for kernel in ("shrink", "expand") for pair in types]
    names += ["count_rows", "place_experts", "fill_pairs"]
    assert set(RECORD["kernels"]) == {f"{target} {name}" for target in CHECK["TARGETS"] for name in names}
    assert list(CHECK["broken_limits"](RECORD["kernels"])) == []


def test_a_broken_limit_and_a_difference_are_told() -> None:
    key = "sm_90a place_experts"
    problems = list(CHECK["broken_limits"]({key: {"registers": 65, "shared": 50000, "spills": 8}}))
    assert problems == [
        f"{key}: 8 bytes spilled or on the stack; expected none. Keep fewer numbers at once.",
        f"{key}: 65 registers x 1024 threads; expected at most 65536.",
        f"{key}: 50000 bytes of shared memory; expected at most 49152.",
    ]
    assert list(CHECK["differences"]({key: GOOD}, {key: GOOD})) == []
    (line,) = CHECK["differences"]({key: GOOD}, {})
    assert line == f"{key}: got {GOOD}, expected None. Run with --write if that is meant."


def test_the_assembler_s_report_is_read_whole() -> None:
    text = (
        "ptxas info    : Compiling entry function '_ZN5dmole4cuda12_GLOBAL__N_110fill_pairsEv' for 'sm_80'\n"
        "    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 64 bytes smem, 400 bytes cmem[0]\n"
    )
    if shutil.which("c++filt") is None:
        pytest.skip("there is no c++filt on PATH: install binutils")
    assert CHECK["reported"](text) == {"fill_pairs": {"registers": 255, "shared": 64, "spills": 28}}


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(SystemExit, match="check_cuda got .*; expected nothing or --write"):
        CHECK["main"](["--quick"])


@NEEDS_NVCC
def test_the_glue_compiles_against_torch_s_headers(tmp_path: Path) -> None:
    """Without a CUDA build of torch nothing links it: its headers are there, but for one that CMake makes."""
    made = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    made.parent.mkdir(parents=True)
    made.write_text("#pragma once\n", encoding="utf-8")
    nvcc = subprocess.run(["nvcc", "--dryrun", "-E", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    top = next(line.partition("TOP=")[2] for line in nvcc.splitlines() if "TOP=" in line)
    system = [str(tmp_path), *include_paths(), f"{top}/include"]
    command = ["g++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    command += [flag for folder in system for flag in ("-isystem", folder)]
    done = subprocess.run(
        [*command, str(ROOT / "csrc/cuda/multi_lora_op.cpp")], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
