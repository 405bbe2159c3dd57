# SPDX-License-Identifier: Apache-2.0
"""The mini benchmark's base model: 7 M parameters of transformers' LLaVA classes, shipped with the package.

A plain transformers folder. Pretrained by ``python -m mini_cmit.pretraining`` on procedural scenes and on entities that
no task uses; the folder holds the log and the recipe beside the weights. Float16 on disk, float32 in memory.
"""

from __future__ import annotations

from pathlib import Path

from dmole.models.multimodal import MultimodalModel, load_model

MINI_WEIGHTS = Path(__file__).parent / "weights"


def mini_folder() -> Path:
    """The folder of the shipped model: what `model: mini` stands for.

    Raises FileNotFoundError, with the command that rebuilds them, when the weights are not there.
    """
    if not (MINI_WEIGHTS / "model.safetensors").exists():
        raise FileNotFoundError(
            f"the mini model's weights are missing: {MINI_WEIGHTS / 'model.safetensors'} does not exist; expected the "
            f"file that the package ships. Rebuild it with `python -m mini_cmit.pretraining --output {MINI_WEIGHTS}`."
        )
    return MINI_WEIGHTS


def load_mini_model() -> MultimodalModel:
    """The shipped model; every linear of both towers is a candidate."""
    return load_model(mini_folder())
