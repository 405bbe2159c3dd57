# SPDX-License-Identifier: Apache-2.0
"""What has to be said before anything is imported.

Triton's interpreter is chosen: later is too late, and without Triton it means nothing. What torchao and torch log about
their own builds is left out: it would come after the summary of the tests.

The torchvision of the index is a CUDA build, whose import fails beside a CPU build of torch, and with it that of every
image processor of transformers. Nothing here calls its operators, so that their names are enough.
"""

from __future__ import annotations

import importlib.util
import os

from dmole.notices import leave_out_notices

os.environ.setdefault("TRITON_INTERPRET", "1")
leave_out_notices()

if importlib.util.find_spec("torchvision") is not None:
    try:
        import torchvision  # type: ignore[import-not-found]  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        from torch.library import Library

        # An operator lives as long as its Library does.
        TORCHVISION = Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            TORCHVISION.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
