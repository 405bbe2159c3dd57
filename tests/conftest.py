# SPDX-License-Identifier: Apache-2.0
"""What has to be said before anything is imported.

Triton's interpreter is chosen: later is too late, and without Triton it means nothing. What torchao and torch log about
their own builds is left out: it would come after the summary of the tests.
"""

from __future__ import annotations

import logging
import os

os.environ.setdefault("TRITON_INTERPRET", "1")
for library in ("torchao", "torch.utils._pytree"):
    logging.getLogger(library).setLevel(logging.ERROR)
