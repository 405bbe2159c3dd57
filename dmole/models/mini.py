# SPDX-License-Identifier: Apache-2.0
"""The mini benchmark's base model: 7 M parameters of transformers' LLaVA classes, shipped with the package.

Pretrained by ``python -m dmole.pretraining`` on procedural scenes and on entities that no task uses; the folder holds
the log and the recipe beside the weights. Float16 on disk, float32 in memory.
"""

from __future__ import annotations

from pathlib import Path

from dmole.models.multimodal import MultimodalModel, load_model

MINI_WEIGHTS = Path(__file__).parent / "mini_weights"


def load_mini_model() -> MultimodalModel:
    """Reads the shipped weights; every linear of both towers is a candidate.

    Raises FileNotFoundError, with the command that rebuilds them, when the weights are not there.
    """
    if not (MINI_WEIGHTS / "model.safetensors").exists():
        raise FileNotFoundError(
            f"the mini model's weights are missing: {MINI_WEIGHTS / 'model.safetensors'} does not exist; expected the "
            f"file that the package ships. Rebuild it with `python -m dmole.pretraining --output {MINI_WEIGHTS}`."
        )
    return load_model(MINI_WEIGHTS)
