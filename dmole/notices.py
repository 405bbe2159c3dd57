# SPDX-License-Identifier: Apache-2.0
"""Two notices of libraries about their own builds, left out wherever `dmole` is imported before transformers.

Processor classes of transformers import torchao, which logs each CUDA library that a CPU machine cannot load, and its
use of an older call of torch. Nobody who runs dmole can act on either. Everything else that the two log is shown.
"""

from __future__ import annotations

import logging

# logger: how the message starts, before its arguments are filled in.
NOTICES = {
    "torchao": "Failed to load ",
    "torch.utils._pytree": "%s is an Enum subclass and is now natively supported",
}


def leave_out_notices() -> None:
    """Filters `NOTICES` out of their loggers, in this process. A second call changes nothing."""
    for name in NOTICES:
        logger = logging.getLogger(name)
        if _is_news not in logger.filters:
            logger.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(NOTICES[record.name])
