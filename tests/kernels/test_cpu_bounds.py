# SPDX-License-Identifier: Apache-2.0
"""No compiled op reads or writes a byte beside its tensors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dmole_kernels import cpu

pytestmark = pytest.mark.skipif(cpu.EXTENSION is None, reason=f"no compiled extension: {cpu.MISSING}")
SCRIPT = Path(__file__).with_name("guarded_memory.py")


@pytest.mark.skipif(sys.platform != "linux", reason="guard pages by mprotect")
def test_tensors_beside_forbidden_pages(level: str) -> None:
    """In a process of its own: a touch of such a page ends it."""
    path = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), level], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode != -signal.SIGSEGV, done.stderr
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{level}: ")
