# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from dmole_kernels import BACKENDS, choose_backend, cpu, cuda, multi_lora, use_backend
from dmole_kernels import _backend as backend
from dmole_kernels._grad_norm import ACCUMULATE, NORM, SKETCH
from dmole_kernels._masked_pool import POOL
from dmole_kernels._multi_lora import BACKWARD, FORWARD
from dmole_kernels._router_score import SCORE, SCORE_BACKWARD, SELECT

COMPILED = cpu.EXTENSION is not None
NEEDS_EXTENSION = pytest.mark.skipif(not COMPILED, reason=f"no compiled extension: {cpu.MISSING}")


def printed(**environment: str) -> str:
    """What `python -m dmole_kernels` prints."""
    command = [sys.executable, "-m", "dmole_kernels"]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment}).stdout


@NEEDS_EXTENSION
def test_auto_takes_the_compiled_kernels_where_they_serve() -> None:
    choice = choose_backend("auto", "cpu")
    assert (choice.name, choice.reason) == ("cpu", f"the first of {tuple(BACKENDS)} with a kernel for cpu")
    assert choose_backend("auto", "cuda").name == ("triton" if "triton" in BACKENDS else "reference")
    for dtype in (torch.float64, torch.float16):
        name = str(dtype).removeprefix("torch.")
        choice = choose_backend("auto", "cpu", dtype)
        assert choice.name == "reference"
        assert choice.reason.endswith(f"; 'cpu' computes in float32 or bfloat16, not {name}")


def test_without_the_extension_auto_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "EXTENSION", None)
    monkeypatch.setattr(cpu, "MISSING", "No module named 'dmole_kernels._C'")
    monkeypatch.setattr(backend, "BACKENDS", {"reference": None})
    choice = choose_backend()
    assert choice.name == "reference"
    assert choice.reason == (
        "the first of ('reference',) with a kernel for cpu; 'cpu' is not built: No module named 'dmole_kernels._C'"
    )
    with pytest.raises(
        ValueError, match=r"backend='cpu' is not in this build of dmole_kernels \(No module named 'dmole_kernels._C'\)"
    ):
        choose_backend("cpu")
    with pytest.raises(RuntimeError, match="expected the compiled extension. Install torch and a C.. compiler, then"):
        cpu.extension()


def test_by_name() -> None:
    assert choose_backend("reference", "cuda").reason == "asked for by name"


@NEEDS_EXTENSION
def test_by_name_for_tensors_it_does_not_serve_is_an_error() -> None:
    with pytest.raises(
        ValueError, match="backend='cpu' got a tensor on 'cuda'; expected cpu. Move the tensors or pass"
    ):
        choose_backend("cpu", "cuda")
    with pytest.raises(
        ValueError, match="backend='cpu' got float64; expected float32 or bfloat16. Cast the tensors or"
    ):
        choose_backend("cpu", "cpu", torch.float64)


@pytest.mark.parametrize("name", ["", *sorted({"cuda", "triton"} - set(BACKENDS))])
def test_what_does_not_exist_is_an_error_that_names_what_does(name: str) -> None:
    missing = {"triton": " (Triton is not installed)", "cuda": f" ({cuda.MISSING})"}.get(name, "")
    expected = (
        f"backend={name!r} is not in this build of dmole_kernels{missing}; expected 'auto' or one of "
        f"{', '.join(map(repr, BACKENDS))}. Pass backend='auto' or backend='reference'."
    )
    with pytest.raises(ValueError) as caught:
        choose_backend(name)
    assert str(caught.value) == expected
    with pytest.raises(ValueError) as caught, use_backend(name):
        pass
    assert str(caught.value) == expected


def test_use_backend_says_what_auto_means_nests_and_ends() -> None:
    before = choose_backend().name
    with use_backend("reference"):
        assert choose_backend() == backend.BackendChoice(name="reference", reason="asked for by use_backend")
        with pytest.raises(KeyError), use_backend("auto"):
            assert choose_backend().name == before
            raise KeyError
        assert choose_backend().name == "reference"
    assert choose_backend().name == before


@NEEDS_EXTENSION
def test_use_backend_chooses_the_kernel_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise KeyError("the cpu kernel ran")

    monkeypatch.setitem(FORWARD, "cpu", refuse)
    arguments = (torch.ones(2, 4), None, [torch.ones(1, 4)], [torch.ones(3, 1)], torch.ones(2, 1), [1.0])
    with use_backend("reference"):
        multi_lora(*arguments)
        with pytest.raises(KeyError, match="the cpu kernel ran"):
            multi_lora(*arguments, backend="cpu")
    with pytest.raises(KeyError, match="the cpu kernel ran"):
        multi_lora(*arguments)


def test_every_backend_has_every_kernel() -> None:
    everywhere = set(BACKENDS) - {"cuda"}
    for table in (NORM, ACCUMULATE, SKETCH, SCORE, SCORE_BACKWARD, POOL):
        assert set(table) == everywhere
    assert all({"direct", "ghost"} <= set(methods) for methods in NORM.values())
    assert set(FORWARD) == set(BACKWARD) == set(BACKENDS)
    # Choosing tasks is a sort of a few numbers: nothing to win, so the reference's is the only one beside the CPU's.
    assert set(SELECT) == everywhere - {"triton"}


def test_the_module_prints_backend_and_torch() -> None:
    text = printed()
    choice = choose_backend()
    assert any("multi_lora" in line and line.endswith(f": {choice.reason}") for line in text.splitlines())
    assert torch.__version__ in text
    assert torch.backends.cpu.get_cpu_capability() in text


@NEEDS_EXTENSION
def test_the_module_prints_isa_and_compiler() -> None:
    for level in cpu.available_isas():
        text = printed(DMOLE_KERNELS_ISA=level)
        assert f"isa       {level} of {', '.join(cpu.available_isas())}" in text
    assert cpu.build_info()["compiler"] in text


@NEEDS_EXTENSION
def test_an_instruction_set_that_is_not_there_is_an_error() -> None:
    listed = ", ".join(map(repr, cpu.available_isas()))
    expected = f"isa is 'neon'; expected 'auto' or what this machine runs: {listed}. Choose one of these."
    with pytest.raises(ValueError) as caught:
        cpu.set_isa("neon")
    assert str(caught.value) == expected
    command = [sys.executable, "-c", "import dmole_kernels.cpu as cpu; cpu.isa()"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DMOLE_KERNELS_ISA": "neon"})
    assert expected.replace("isa is", "DMOLE_KERNELS_ISA is") in done.stderr
