# SPDX-License-Identifier: Apache-2.0
"""D-MoLE (ICML 2025, arXiv 2506.11672): the method, its settings, and its four parts."""

from dmole.methods.dmole.method import DMoLE

__all__ = ["DMoLE"]
