# SPDX-License-Identifier: Apache-2.0
"""
    python scripts/sanitize.py [pytest arguments]
    python scripts/sanitize.py --draws 500 --record results/sanitized_draws.json

Builds the extension with the address and undefined-behaviour sanitizers in build/sanitized, beside a copy of
`dmole_kernels`, and runs the tests of the compiled ops on it. Fails when a test fails or a sanitizer reports, which
ends the process. Needs GCC. The extension of the working tree stays as it is.

With --draws, only the drawn (hypothesis) tests run, so many draws each, and the record says what ran to its end.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "sanitized"
TESTS = (
    "test_cpu_bounds.py",
    "test_cpu_gemm.py",
    "test_cpu_grad_norm.py",
    "test_cpu_masked_pool.py",
    "test_cpu_multi_lora.py",
    "test_cpu_multi_lora_masking.py",
    "test_cpu_router_score.py",
    "test_each_backend.py",
    "test_frozen_linear.py",
    "test_multi_lora.py",
    "test_multi_lora_linear.py",
    "test_training_sizes.py",
)
# Nothing of the reference is sanitized.
CHOICE = ("-k", "not ((test_each_backend or test_multi_lora_linear or test_training_sizes) and reference)")


def build() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    shutil.copytree(
        ROOT / "dmole_kernels", FOLDER / "dmole_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    command = ["setup.py", "-q", "build_ext", "--build-lib", str(FOLDER), "--build-temp", f"{FOLDER}-objects"]
    subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        check=True,
        env={**os.environ, "DMOLE_KERNELS_SANITIZE": "1", "DMOLE_KERNELS_BUILD": "require"},
    )


def runtime_library(name: str) -> str:
    """The file that the compiler would link. Raises ValueError where it has none."""
    command = [os.environ.get("CXX", "c++"), f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    # Without such a file the compiler hands the name back.
    if not os.path.isabs(found):
        raise ValueError(f"{command[0]} has no {name}; expected GCC with its sanitizers. Set CXX to such a GCC.")
    return found


def run(arguments: list[str], **variables: str) -> int:
    libraries = ("libasan.so", "libubsan.so", "libstdc++.so")
    environment = {
        **os.environ,
        # Python itself is not sanitized, so the runtimes come first, and C++'s before ASan looks for its exceptions.
        "LD_PRELOAD": " ".join(map(runtime_library, libraries)),
        # Python and torch keep memory until the process ends and never give it back: not this package's leaks.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        **variables,
    }
    tests = arguments or [*CHOICE, *(f"{ROOT}/tests/kernels/{name}" for name in TESTS)]
    # The working directory comes first on Python's path: the copy is what the tests import. Only Python's own output is
    # captured, so that a report on the process's stderr is seen.
    options = ["-c", f"{ROOT}/pyproject.toml", "--rootdir", str(ROOT), "-p", "no:cacheprovider", "--capture=sys"]
    return subprocess.run([sys.executable, "-m", "pytest", *options, *tests], cwd=FOLDER, env=environment).returncode


def run_drawn(draws: int, record: Path) -> int:
    """The drawn tests to their end; writes how many there were, with commit and date."""
    report = FOLDER / "drawn.xml"
    tests = [f"{ROOT}/tests/kernels/{name}" for name in TESTS]
    code = run(["-m", "hypothesis", f"--junitxml={report}", *tests], DMOLE_DRAWS=str(draws))
    if code == 0:
        (suite,) = ElementTree.parse(report).getroot()
        git = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
        found = {
            "tests": int(suite.attrib["tests"]),
            "failed": int(suite.attrib["failures"]) + int(suite.attrib["errors"]),
            "skipped": int(suite.attrib["skipped"]),
            "draws_per_test": draws,
            "sanitizers": ["address", "undefined"],
            "commit": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
            "date": datetime.date.today().isoformat(),
        }
        record.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return code


if __name__ == "__main__":
    build()
    if sys.argv[1:2] == ["--draws"]:
        sys.exit(run_drawn(int(sys.argv[2]), Path(sys.argv[4])))
    sys.exit(run(sys.argv[1:]))
