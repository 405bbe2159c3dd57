# SPDX-License-Identifier: Apache-2.0
"""Images and conversations that are drawn, for checks of a model whose data are not there yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

QUESTION, ANSWER = "What is in this picture?", "A red boat on a lake."


def drawn_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coarse blocks of random colours: images of other seeds differ in every patch."""
    generator = np.random.default_rng([seed, width, height])
    blocks = generator.integers(0, 256, (max(height // 8, 2), max(width // 8, 2), 3), dtype=np.uint8)
    return Image.fromarray(blocks, "RGB").resize((width, height), Image.Resampling.NEAREST)


def drawn_conversation(
    images: Sequence[Image.Image], question: str = QUESTION, answer: str = ANSWER
) -> list[dict[str, Any]]:
    """A question about the images, and its answer, as transformers' messages."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [
        {"role": "user", "content": [*content, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
