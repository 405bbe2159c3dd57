# SPDX-License-Identifier: Apache-2.0
"""Where things that can be made again are kept, such as a benchmark's images and image features that never change.

The folder is ``$DMOLE_CACHE`` if set, else ``$XDG_CACHE_HOME/dmole``, else ``~/.cache/dmole``. Deleting it
costs time only: no number depends on what the folder holds, or on who filled it.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The cache's root; not created here."""
    if explicit := os.environ.get("DMOLE_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmole"
