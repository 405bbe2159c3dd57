# SPDX-License-Identifier: Apache-2.0
"""The machine as this process may use it."""

import subprocess
import sys

import torch

from dmole import machine


def test_cores_memory_and_processor_are_plausible() -> None:
    assert machine.usable_cores() >= 1
    memory = machine.memory_gib()
    assert memory is None or 0.1 < memory < 100_000
    assert torch.__version__ and 0.05 < machine.peak_memory_gib() < 200
    assert machine.processor_name()
    assert machine.processor().get("model name", machine.processor_name()) == machine.processor_name()


def test_it_needs_the_standard_library_alone() -> None:
    code = "import sys, dmole.machine; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
