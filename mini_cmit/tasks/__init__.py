# SPDX-License-Identifier: Apache-2.0
"""The mini benchmark: nine real tasks built from material that ordinary Python packages carry."""

from mini_cmit.tasks.build import build_mini

__all__ = ["build_mini"]
