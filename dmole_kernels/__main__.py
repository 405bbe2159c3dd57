# SPDX-License-Identifier: Apache-2.0
"""Prints which backend the ops use on this machine, and why; `check-aot` compiles the Triton kernels ahead of time."""

import sys

from dmole_kernels.backend import explain_backend

if __name__ == "__main__":
    if sys.argv[1:2] == ["check-aot"]:
        from dmole_kernels.aot import check_aot

        sys.exit(check_aot(sys.argv[2:]))
    print(explain_backend())
