# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "multi_lora_in_your_model.py"


def test_the_example_serves_two_experts_in_one_batch(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE))
    assert "{'up': [10, 11, 12, 13, 14, 15], 'down': [10, 9, 8, 7, 6, 5]}" in capsys.readouterr().out
