# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dmole_kernels import BACKENDS, choose_backend
from dmole_kernels.grad_norm import ACCUMULATE, NORM, SKETCH
from dmole_kernels.masked_pool import POOL
from dmole_kernels.multi_lora import BACKWARD, FORWARD
from dmole_kernels.router_score import SCORE, SCORE_BACKWARD, SELECT


def test_auto_names_a_backend_and_a_reason() -> None:
    choice = choose_backend("auto", "cpu")
    assert (choice.name, choice.reason) == ("reference", "the first of ('reference',) that serves cpu")
    assert choose_backend("reference", "cuda").reason == "asked for by name"


@pytest.mark.parametrize("name", ["cpu", "triton", "cuda", ""])
def test_what_does_not_exist_is_an_error_that_names_what_does(name: str) -> None:
    expected = (
        f"backend={name!r} is not in this build of dmole_kernels; expected 'auto' or one of 'reference'. "
        "Pass backend='auto' or backend='reference'."
    )
    with pytest.raises(ValueError) as caught:
        choose_backend(name)
    assert str(caught.value) == expected


def test_every_backend_has_every_kernel() -> None:
    for table in (FORWARD, BACKWARD, ACCUMULATE, SKETCH, SCORE, SCORE_BACKWARD, SELECT, POOL):
        assert set(table) == set(BACKENDS)
    assert {name for name, _ in NORM} == set(BACKENDS)


def test_the_module_prints_backend_torch_and_isa() -> None:
    done = subprocess.run([sys.executable, "-m", "dmole_kernels"], capture_output=True, text=True, check=True)
    assert "backend   reference (the first of ('reference',) that serves cpu)" in done.stdout
    assert torch.__version__ in done.stdout
    assert torch.backends.cpu.get_cpu_capability() in done.stdout
