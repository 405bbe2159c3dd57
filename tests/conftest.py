# SPDX-License-Identifier: Apache-2.0
"""Chooses Triton's interpreter before anything imports Triton: later is too late. Without Triton it means nothing."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
