# SPDX-License-Identifier: Apache-2.0
"""
    python -m dmole_kernels               which backend the ops use on this machine, and why
    python -m dmole_kernels check-aot     compiles the Triton kernels for every target, without a GPU (`aot`)
    python -m dmole_kernels tune          measures launch configurations on a GPU (`tune`)

Without a GPU the last one runs in Triton's interpreter, on tiny shapes, to show that it works. In a checkout,
`python -m benchmarks.check_gpu` checks and measures the kernels on a GPU.
"""

import os
import sys
from collections.abc import Callable, Sequence

from dmole_kernels import triton_backend
from dmole_kernels._backend import explain_backend


def _check_aot() -> Callable[[Sequence[str]], int]:
    from dmole_kernels._aot import check_aot

    return check_aot


def _tune() -> Callable[[Sequence[str]], int]:
    _prepare_triton()
    from dmole_kernels._tune import main

    return main


def _prepare_triton() -> None:
    """Selects Triton's interpreter where there is no GPU; this works only before Triton is imported."""
    import torch

    if not triton_backend.available():
        raise SystemExit(triton_backend.MISSING)
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


COMMANDS = {"check-aot": _check_aot, "tune": _tune}


def main(arguments: Sequence[str]) -> int:
    if not arguments:
        print(explain_backend())
        return 0
    if arguments[0] not in COMMANDS:
        raise SystemExit(f"python -m dmole_kernels got {arguments[0]!r}; expected nothing or {', '.join(COMMANDS)}.")
    return COMMANDS[arguments[0]]()(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
