# SPDX-License-Identifier: Apache-2.0
"""An expert of two towers with gates of their own is a PEFT folder: PEFT loads it and computes what we compute."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from dmole.models.adapters import Adapters, add_experts, attach, detach
from dmole.models.drawn import drawn_conversation, drawn_image
from dmole.models.vision_language import VisionLanguageModel
from dmole_kernels import ExpertGates, save_experts
from mini_cmit.model.tiny import build_tiny_model


@pytest.fixture
def adapted() -> tuple[VisionLanguageModel, Adapters, dict[str, ExpertGates]]:
    vlm = build_tiny_model()
    gates = {"vision": ExpertGates(), "language": ExpertGates()}
    adapters = attach(vlm.model, vlm.candidates, gates=gates)
    chosen = [name for name in adapters if name.endswith(("q_proj", "down_proj"))]
    generator = torch.Generator().manual_seed(1)
    add_experts(adapters, chosen, "charts", rank=3, alpha=6.0, generator=generator)
    with torch.no_grad():
        for name in chosen:
            adapters[name].bank.expert("charts").lora_b.normal_(generator=generator)
    return vlm, adapters, gates


def logits(vlm: VisionLanguageModel, model: torch.nn.Module) -> torch.Tensor:
    encoded = vlm.encode([drawn_conversation([drawn_image(16, 16)])], with_answers=False)
    with torch.inference_mode():
        result: torch.Tensor = model(**encoded.inputs).logits
    return result


# PEFT 0.21 still asks transformers 5 by the old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_computes_the_same(
    adapted: tuple[VisionLanguageModel, Adapters, dict[str, ExpertGates]], tmp_path: Path
) -> None:
    vlm, adapters, gates = adapted
    base = logits(vlm, vlm.model)
    gate = torch.ones(1, 1)
    with gates["vision"].use(gate, ["charts"]), gates["language"].use(gate, ["charts"]):
        ours = logits(vlm, vlm.model)
    (folder,) = save_experts(vlm.model, tmp_path, ["charts"])
    detach(vlm.model, adapters)
    theirs = logits(vlm, PeftModel.from_pretrained(vlm.model, str(folder)))
    assert (ours - base).abs().max() > 1e-3
    torch.testing.assert_close(theirs, ours)
