# SPDX-License-Identifier: Apache-2.0
"""`python -m dmole_kernels`: what it prints, and what it says to words it does not know."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from benchmarks.check_gpu.__main__ import main as check_gpu
from dmole_kernels import triton_backend
from dmole_kernels.__main__ import COMMANDS, main


def test_without_a_word_it_explains_the_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("backend ")


def test_an_unknown_command_is_refused() -> None:
    with pytest.raises(SystemExit, match="got 'check-tpu'; expected nothing or check-aot, tune"):
        main(["check-tpu"])


@pytest.mark.parametrize(
    "command", [lambda: main(["tune"]), lambda: check_gpu([])], ids=["tune", "benchmarks.check_gpu"]
)
def test_without_triton_it_says_what_to_install(command: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "available", lambda: False)
    expected = "Triton is not installed; expected triton>=3.2,<3.10. Run pip install 'triton>=3.2,<3.10'."
    with pytest.raises(SystemExit, match=re.escape(expected)):
        command()


def test_every_command_is_described() -> None:
    import dmole_kernels.__main__ as module

    assert all(f"python -m dmole_kernels {name} " in str(module.__doc__) for name in COMMANDS)
