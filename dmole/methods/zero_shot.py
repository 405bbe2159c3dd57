# SPDX-License-Identifier: Apache-2.0
"""Zero-shot: the pretrained model as it is. It has no stage; the run keeps row 0 of the matrix only."""

from __future__ import annotations

from typing import ClassVar

from dmole.methods.base import Pretrained


class ZeroShot(Pretrained):
    """Nothing is trained and nothing is added."""

    name: ClassVar[str] = "zero_shot"
