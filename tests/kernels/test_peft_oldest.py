# SPDX-License-Identifier: Apache-2.0
"""The bridge to PEFT on the oldest version that pyproject.toml states; the other tests run on the newest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_bridge_works_on_the_oldest_peft_of_the_range(tmp_path: Path) -> None:
    stated = re.search(r'peft = \["peft>=([\d.]+),', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert stated is not None
    oldest = f"{stated.group(1)}.0"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), f"peft=={oldest}"]
    subprocess.run(install, check=True, timeout=300, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    version = [sys.executable, "-c", "import peft; print(peft.__version__)"]
    assert subprocess.run(version, env=environment, check=True, capture_output=True, text=True).stdout.strip() == oldest
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/kernels/test_peft_layer.py"]
    found = subprocess.run(tests, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout[-4000:]
    assert re.search(r"\b10 passed", found.stdout)
