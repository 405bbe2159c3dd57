# SPDX-License-Identifier: Apache-2.0
"""Continual multimodal instruction tuning: D-MoLE, its baselines, runs that resume, numbers that can be recomputed.

Entry points: ``dmole.runs.runner.run(RunConfig(...))``, the command ``dmole``, ``dmole.methods`` for your own method.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmole.notices import leave_out_notices

if TYPE_CHECKING:
    from dmole.grown.model import GrownModel

__all__ = ["load"]

# Here, because every process that imports a part of dmole comes by before that part imports transformers.
leave_out_notices()


def load(folder: str | Path, *, base: str | None = None, device_map: Any = None, dtype: Any = None) -> GrownModel:
    """The model of a finished run, ready to be asked; see `dmole.grown.loading.load`."""
    # Imported here: `import dmole` alone must not load transformers.
    from dmole.grown.loading import load as load_grown

    return load_grown(folder, base=base, device_map=device_map, dtype=dtype)
