# SPDX-License-Identifier: Apache-2.0
"""A saved model read back onto its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dmole.config import EvaluationSettings
from dmole.grown.model import GrownModel
from dmole.grown.saved import EXPERTS, SavedModel, SavedModelError, expert_tensor_names, find, read
from dmole.methods import method_class
from dmole.methods.base import Method
from dmole.methods.budget import BudgetSettings
from dmole.methods.settings import LoraSettings, MethodSettings
from dmole.models.declaration import read_declaration
from dmole.models.vision_language import VisionLanguageModel
from dmole.sections import build_section
from dmole.sources import open_base
from dmole_kernels import load_experts


def load(folder: str | Path, *, base: str | None = None, device_map: Any = None, dtype: Any = None) -> GrownModel:
    """The base model with everything that a run has taught it.

        grown = dmole.load("runs/first", device_map="auto", dtype="bfloat16")
        grown.answer(images=["chart.png"], text="Which bar is highest?").text

    Args:
        folder: of a finished run, of an output folder with one run, or the `model` folder itself.
        base: where the base model is now; None is the folder or hub id that the run used.
        device_map, dtype: of the base's weights, as in `from_pretrained`; None is what the run used. Experts are
            float32 on the device of their linear.

    Raises:
        SavedModelError: for a folder without a model, a damaged or edited file, a newer format, another base model or
            another processor than the experts were trained with.
    """
    saved = read(find(Path(folder)))
    declaration = read_declaration(saved.base.declaration)
    vlm = open_base(
        saved.base.model if base is None else base,
        dtype=saved.base.dtype if dtype is None else dtype,
        device_map=device_map,
        quantization=saved.base.quantization,
        declaration=declaration,
    )
    check_base(saved, vlm)
    method = restore(saved, vlm)
    return GrownModel(
        method,
        tasks=[task["name"] for task in saved.tasks],
        generation=build_section(EvaluationSettings, saved.generation),
        precision=saved.precision,
        folder=saved.folder,
    )


def check_base(saved: SavedModel, vlm: VisionLanguageModel) -> None:
    """Raise `SavedModelError` unless `vlm` is the base, with the processor, that the experts were trained on."""
    wanted = saved.base.identity
    found = vlm.base_identity(full=wanted["kind"] == "full")
    for name in ("sha256", "commit"):
        if found[name] != wanted[name] and (name == "sha256" or None not in (found[name], wanted[name])):
            raise SavedModelError(
                f"base: got {vlm.source}, whose {name} is {str(found[name])[:12]}; expected {saved.base.model} with "
                f"{str(wanted[name])[:12]}, on which the experts were trained. Pass base= with that model."
            )
    if vlm.inputs_digest() != saved.base.inputs:
        raise SavedModelError(
            f"processor: that of {vlm.source} makes other inputs than the one that the experts were trained with; "
            f"expected the same image processor, tokenizer and chat template. Restore the model's folder."
        )


def restore(saved: SavedModel, vlm: VisionLanguageModel) -> Method:
    """The method as it was at the end of the run, attached to `vlm`."""
    kind = method_class(saved.method)
    settings = MethodSettings(
        lora=build_section(LoraSettings, saved.settings["lora"]),
        candidates=saved.settings["candidates"],
        budget=build_section(BudgetSettings, saved.settings["budget"]),
        options=build_section(kind.Options, saved.settings["options"]),
    )
    method = kind(vlm, settings, seed=saved.seed)
    if saved.experts:
        load_experts(vlm.model, [saved.folder / EXPERTS / name for name in saved.experts], list(saved.experts))
    names = expert_tensor_names(vlm.model)
    weights = {name: p.detach() for name, p in vlm.model.named_parameters() if name in names}
    experts = {f"{saved.prefix}{name}": tensor.clone() for name, tensor in weights.items()}
    method.load_state({**experts, **saved.tensors}, saved.state)
    return method
