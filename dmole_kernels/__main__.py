# SPDX-License-Identifier: Apache-2.0
"""Prints which backend the ops use on this machine, and why."""

from dmole_kernels.backend import explain_backend

if __name__ == "__main__":
    print(explain_backend())
