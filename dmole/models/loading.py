# SPDX-License-Identifier: Apache-2.0
"""Any vision-language model of transformers, by folder or hub id: `AutoProcessor`, `AutoModelForImageTextToText`.

`from_pretrained` is the only way in: the names of tensors on disk differ from those in memory in most families, so
`load_state_dict` of a file cannot work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dmole.models.declaration import Declaration
from dmole.models.progress_bars import no_progress_bars
from dmole.models.vision_language import VisionLanguageModel, wrap

QUANTIZATIONS = ("int8",)


def load(
    name_or_folder: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    quantization: Any = None,
    declaration: Declaration | None = None,
) -> VisionLanguageModel:
    """The model, frozen and in evaluation mode, with its processor, towers and candidates.

    Args:
        name_or_folder: what `from_pretrained` takes; weights may be sharded.
        dtype: of the weights; None is what the checkpoint has.
        device_map: as in `from_pretrained`, such as "auto"; None is the CPU.
        quantization: "int8" (torchao, weights only), a quantization config of transformers, or None. A checkpoint that
            was saved quantised needs nothing here.
        declaration: what the rules cannot find out, over the lines of `dmole.models.declaration.KNOWN`.

    Raises:
        ValueError: for a folder without a model or a processor, a model of another kind, weights that the checkpoint
            lacks, or towers and candidates that the rules do not find.
        ImportError: for a processor that needs a package which is missing, such as torchvision.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoModelForImageTextToText

    source = str(name_or_folder)
    if not Path(source).is_dir() and (source.startswith(("/", ".", "~")) or source.count("/") > 1):
        raise ValueError(f"model: the folder {source!r} does not exist; expected one, or a hub id. Check the path.")
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ValueError(
            f"model: {source!r} has no config.json; expected a folder that save_pretrained wrote. Check the path."
        )
    config = AutoConfig.from_pretrained(source)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(
            f"model: {source!r} is a {config.model_type} model, which AutoModelForImageTextToText does not have; "
            f"expected a model that reads images and text and writes text. Choose another checkpoint."
        )
    processor = _processor(source)
    settings: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype}
    if device_map is not None:
        settings["device_map"] = device_map
    if quantization is not None:
        settings["quantization_config"] = _quantization(quantization)
    auto: Any = AutoModelForImageTextToText  # its annotation says nothing of output_loading_info
    with no_progress_bars():
        model, report = auto.from_pretrained(source, output_loading_info=True, **settings)
    lacking = sorted(report["missing_keys"]) + [str(item) for item in report["mismatched_keys"]]
    if lacking:
        raise ValueError(
            f"model: the weights of {source!r} lack {lacking[:3]} ({len(lacking)}), which would be random; expected a "
            f"tensor for every parameter of config.json. Save the model again, or choose another checkpoint."
        )
    return wrap(model, processor, declaration, source=source)


def _processor(source: str) -> Any:
    from transformers import AutoProcessor

    names = ("processor_config.json", "preprocessor_config.json")
    if Path(source).is_dir() and not any((Path(source) / name).is_file() for name in names):
        raise ValueError(
            f"processor: {source!r} has neither {' nor '.join(names)}; expected the model's processor. Save it beside "
            f"the model with processor.save_pretrained."
        )
    auto: Any = AutoProcessor
    processor = auto.from_pretrained(source)
    lacking = [part for part in ("image_processor", "tokenizer") if getattr(processor, part, None) is None]
    if lacking:
        # AutoProcessor takes a tokenizer or an image processor where it finds no processor.
        raise ValueError(
            f"processor: AutoProcessor made a {type(processor).__name__} without {' or '.join(lacking)} of {source!r}; "
            f"expected a processor of both. Save it beside the model with processor.save_pretrained."
        )
    return processor


def _quantization(asked: Any) -> Any:
    if not isinstance(asked, str):
        return asked
    if asked not in QUANTIZATIONS:
        raise ValueError(
            f"quantization: got {asked!r}; expected one of {', '.join(QUANTIZATIONS)}, or a quantization config of "
            f"transformers. Pass such a config for others."
        )
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())
