# SPDX-License-Identifier: Apache-2.0
"""Random weights in the real classes, two 32-wide layers a tower, pixels as input: a model for tests, in milliseconds.

The folder it is written to is a plain transformers folder, as any other model's.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers.models.llava import LlavaProcessor

from dmole.models.declaration import Declaration
from dmole.models.vision_language import VisionLanguageModel, wrap
from mini_cmit.model.architecture import build_network, train_tokenizer
from mini_cmit.model.base import BaseModel
from mini_cmit.model.image_processing import PixelImageProcessor
from mini_cmit.model.processing import CHAT_TEMPLATE

_GRID = 2


def build_tiny_model(seed: int = 0, *, texts: Iterable[str] = (), side: int = 16) -> VisionLanguageModel:
    """The model in memory; equal seeds give equal weights. ``side`` in pixels, even."""
    corpus = [
        *texts,
        "Describe the image in one sentence.",
        "Answer with the letter.",
        "Answer briefly. yes no red green",
    ]
    tokenizer = train_tokenizer(corpus, vocabulary=400)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(
            tokenizer,
            channels=3,
            grid=_GRID,
            patch=side // _GRID,
            vision_width=32,
            vision_layers=2,
            text_width=32,
            text_layers=2,
            heads=2,
            positions=256,
        )
    processor = LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor=PixelImageProcessor(size={"height": side, "width": side}),
        tokenizer=tokenizer,
        patch_size=side // _GRID,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
    # What `ready` would measure.
    return wrap(network, processor, Declaration(rows="images"))


def write_tiny_model(folder: Path, seed: int = 0, *, texts: Iterable[str] = (), side: int = 16) -> Path:
    """Writes the same model as a plain transformers folder, in float32, and returns the folder."""
    model = build_tiny_model(seed, texts=texts, side=side)
    # Not save_pretrained, which writes nothing in processes after the first.
    BaseModel(model=model.model, processor=model.processor).save(folder, dtype=torch.float32)
    return folder


@functools.cache
def tiny_folder() -> Path:
    """A folder of seed 0 that lasts as long as the process: what `model: tiny` stands for."""
    root = tempfile.mkdtemp(prefix="tiny_model-")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return write_tiny_model(Path(root))
