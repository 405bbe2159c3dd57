# SPDX-License-Identifier: Apache-2.0
"""
    y = W x + s B A x,      s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

A PEFT LoRA folder (`adapter_config.json` and `adapter_model.safetensors`) as ranks, alphas and tensors, read and
written without PEFT. Adapters of any other form raise an error that names the option.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
README_FILE = "README.md"
_PREFIX = "base_model.model."
_SIDES = (".lora_A.weight", ".lora_B.weight")

# Fields of the config that do not change what a trained adapter computes. Any other one must be empty.
_IGNORED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type",
}  # fmt: skip
_READ = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "init_lora_weights",
}  # fmt: skip
# The others (pissa, olora, corda, loftq, lora_ga) change the base's weights when the adapter is made.
_HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraMatrices:
    """The adapter at one linear: scale alpha / rank, A [rank, in_features], B [out_features, rank]."""

    alpha: float
    lora_a: Tensor
    lora_b: Tensor

    @property
    def rank(self) -> int:
        return self.lora_a.shape[0]


def read_folder(folder: Path) -> dict[str, LoraMatrices]:
    """The adapter's matrices by the name of the linear. Raises ValueError for anything but a plain LoRA adapter."""
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        side = next((side for side in _SIDES if key.endswith(side)), None)
        if side is None or not key.startswith(_PREFIX):
            raise ValueError(
                f"{folder}: holds the tensor {key!r}; expected only {_PREFIX}<name>{_SIDES[0]} and {_SIDES[1]}. Other "
                f"kinds of adapters, trained biases and saved modules are not experts."
            )
        sides.setdefault(key.removeprefix(_PREFIX).removesuffix(side), {})[side] = tensor
    if not sides:
        raise ValueError(f"{folder}: {TENSOR_FILE} holds no tensors; expected an adapter. Save it again.")
    matrices = {}
    for name, pair in sides.items():
        if len(pair) != 2:
            lacking = next(side for side in _SIDES if side not in pair)
            raise ValueError(f"{folder}: {name!r} lacks {lacking[1:]!r}; expected A and B. Save the adapter again.")
        lora_a, lora_b = pair[_SIDES[0]], pair[_SIDES[1]]
        r = ranks.get(pattern_of(ranks, name), rank)
        a = alphas.get(pattern_of(alphas, name), alpha)
        if lora_a.dim() != 2 or lora_b.dim() != 2 or not lora_a.shape[0] == lora_b.shape[1] == r:
            raise ValueError(
                f"{folder}: {name!r} has A {tuple(lora_a.shape)} and B {tuple(lora_b.shape)}; expected the rank {r} of "
                f"{CONFIG_FILE}. The folder mixes two adapters: save it again."
            )
        # An expert's scale is alpha / rank.
        matrices[name] = LoraMatrices(float(a) * math.sqrt(r) if config.get("use_rslora") else float(a), lora_a, lora_b)
    return matrices


def pattern_of(patterns: Iterable[str], name: str) -> str | None:
    """The first key that is the name or an ending of it, as a regular expression: the rule of PEFT."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)


def _read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text())
    wrong = [
        f"{key}={value!r}"
        for key, value in config.items()
        if (key not in _IGNORED and key not in _READ and value not in (None, False, 0, "", [], {}))
        or (key == "peft_type" and value != "LORA")
        or (key == "bias" and value not in (None, "none"))
        or (key == "init_lora_weights" and value not in _HARMLESS_INITS)
    ]
    if wrong or "peft_type" not in config:
        raise ValueError(
            f"{folder}: {CONFIG_FILE} has {', '.join(wrong) or 'no peft_type'}; expected a plain LoRA adapter, "
            f"y = W x + s B A x. Train it without, or convert it to plain LoRA with PEFT."
        )
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSOR_FILE
    if not path.is_file():
        pickled = sorted(folder.glob("adapter_model*.bin"))
        found = f"holds {pickled[0].name}, a pickle" if pickled else f"has no {TENSOR_FILE}"
        raise ValueError(
            f"{folder}: {found}; expected safetensors, which run no code when read. Save it with PEFT's "
            f"save_pretrained(..., safe_serialization=True)."
        )
    loaded: dict[str, Tensor] = _safetensors("load_file")(path)
    return loaded


def write_folder(
    folder: Path,
    matrices: Mapping[str, LoraMatrices],
    *,
    modules: Iterable[str] = (),
    dropout: float = 0.0,
    base_name: str | None = None,
) -> None:
    """Writes `matrices` as the stock LoRA folder `folder`, atomically; an existing one is replaced.

    Args:
        modules: the names of the model's modules; PEFT must not match others than the targets by their endings.
    """
    save = _safetensors("save_file")
    config = peft_config(matrices, modules=modules, dropout=dropout, base_name=base_name)
    tensors = {}
    for name, lora in matrices.items():
        tensors[f"{_PREFIX}{name}{_SIDES[0]}"] = lora.lora_a
        tensors[f"{_PREFIX}{name}{_SIDES[1]}"] = lora.lora_b
    made, before = (folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.{suffix}") for suffix in ("new", "old"))
    made.mkdir(parents=True)
    try:
        save(tensors, made / TENSOR_FILE, metadata={"format": "pt"})
        (made / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if (folder / README_FILE).is_file():
            shutil.copy2(folder / README_FILE, made)
        if folder.exists():
            # A folder that is not empty cannot be replaced in one step; in between it has the name `before`.
            os.rename(folder, before)
            os.rename(made, folder)
            shutil.rmtree(before)
        else:
            os.rename(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def check_replaceable(folder: Path) -> None:
    """Raises ValueError where `write_folder` would delete files that are not of an adapter."""
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    foreign = sorted(names - {CONFIG_FILE, TENSOR_FILE, README_FILE})
    if foreign:
        raise ValueError(
            f"folder: {folder} is there and holds {foreign[:3]}; expected a new folder or one that an expert alone is "
            f"in. Choose another one, or remove it."
        )


def peft_config(
    matrices: Mapping[str, LoraMatrices], *, modules: Iterable[str], dropout: float, base_name: str | None
) -> dict[str, Any]:
    """The config with which PEFT applies each adapter to its linear and to no other one."""
    ranks = {name: lora.rank for name, lora in matrices.items()}
    alphas = {name: int(lora.alpha) if lora.alpha.is_integer() else lora.alpha for name, lora in matrices.items()}
    rank, rank_pattern = _with_pattern(ranks)
    alpha, alpha_pattern = _with_pattern(alphas)
    # PEFT also matches names by their endings: "0" would match "head.0".
    caught = [
        name for name in modules if name not in matrices and any(name.endswith(f".{target}") for target in matrices)
    ]
    return {
        "alpha_pattern": alpha_pattern,
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "revision": None,
        "target_modules": "|".join(map(re.escape, matrices)) if caught else list(matrices),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _with_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and the full names that have another one, so that `pattern_of` finds each."""
    common = Counter(values.values()).most_common(1)[0][0]
    pattern = {name: value for name, value in values.items() if value != common}
    if all(values[name] == pattern.get(pattern_of(pattern, name) or "", common) for name in values):
        return common, pattern
    # A name is the ending of another one: list every name, the longest first, as an exact expression.
    every = {re.escape(name): values[name] for name in sorted(values, key=len, reverse=True)}
    return common, every


def _safetensors(function: str) -> Callable[..., Any]:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "safetensors is not installed; expected it for folders of experts. Run pip install safetensors."
        ) from error
    found: Callable[..., Any] = getattr(safetensors.torch, function)
    return found
