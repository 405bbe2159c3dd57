# SPDX-License-Identifier: Apache-2.0
"""compute-sanitizer over the tiny checks: memcheck (addresses outside their tensors) and racecheck (shared memory)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

TOOLS = ("memcheck", "racecheck")
FOUND_SOMETHING = 86  # an exit status that no other failure has


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`state`: "clean", "wrong" or "not run"; `about` is the reason, or the end of its report."""

    tool: str
    state: str
    about: str = ""


def sanitize(seconds: float, *, gpu: bool) -> list[Verdict]:
    """One verdict per tool; each gets an equal fraction of the seconds."""
    program = shutil.which("compute-sanitizer")
    reason = "no GPU" if not gpu else "compute-sanitizer is not on PATH (it is part of the CUDA toolkit)"
    if program is None or not gpu:
        return [Verdict(tool=tool, state="not run", about=reason) for tool in TOOLS]
    # Without PyTorch's memory pool every tensor is a separate allocation, whose bounds are checked.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    verdicts = []
    for tool in TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", str(FOUND_SOMETHING), "--target-processes", "all",
                   sys.executable, "-m", "benchmarks.check_gpu.correctness"]  # fmt: skip
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=seconds / len(TOOLS), check=False
            )
        except subprocess.TimeoutExpired:
            about = f"stopped after {seconds / len(TOOLS):.0f} s; run it by itself: {' '.join(command)}"
            verdicts.append(Verdict(tool=tool, state="not run", about=about))
            continue
        report = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        state = "clean" if done.returncode == 0 else "wrong"
        verdicts.append(Verdict(tool=tool, state=state, about="" if state == "clean" else report))
    return verdicts
