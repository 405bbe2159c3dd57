# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.check_gpu``: see the package."""

import os
import sys
from collections.abc import Sequence

import torch

from dmole_kernels import triton_backend


def main(arguments: Sequence[str]) -> int:
    if not triton_backend.available():
        raise SystemExit(triton_backend.MISSING)
    # Without a GPU, Triton's interpreter; it is chosen before Triton is imported or not at all.
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    from benchmarks.check_gpu.command import main as check

    return check(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
