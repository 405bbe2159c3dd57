# SPDX-License-Identifier: Apache-2.0
"""A task's expert, or a pair of them, as one stock PEFT LoRA folder for other servers.

    one expert      y = W0 x + s B A x                        the saved folder itself, if rank and scale are uniform
    a pair          y = W0 x + [s1 B1, s2 B2] [A1; A2] x      rank r1 + r2, scale 1

Servers take one adapter per request, of one rank and one scale: vLLM's reader of `adapter_config.json` knows no
`rank_pattern` and no `alpha_pattern`. So where the layers differ, matrices are filled up with zeros to the largest rank
and scales are multiplied into B. Only files are read: the base model need not be there.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dmole.files import write_tensors
from dmole.grown.saved import EXPERTS, SavedModel, SavedModelError, find, read

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
A, B = ".lora_A.weight", ".lora_B.weight"
PREFIX = "base_model.model."
VISION_WARNING = (
    "the adapter has {count} layers in the vision tower. Servers that apply LoRA to the language model alone refuse "
    "them or answer otherwise than here (vLLM needs --enable-tower-connector-lora); --language-only leaves them out."
)
LANGUAGE_WARNING = (
    "{count} layers of the vision tower are left out: answers differ from those of this model for samples with images."
)


def export(run: Path, tasks: Sequence[str], to: Path, *, language_only: bool = False) -> tuple[Path, tuple[str, ...]]:
    """Write one LoRA folder that acts like the experts of `tasks` together; returns it and what to know about it.

    Args:
        run: the folder of a run or of its model.
        tasks: one task, or several whose experts are added up.
        to: a folder that does not exist yet.
        language_only: leave out the layers of the vision tower.

    Raises:
        SavedModelError: for a task without an expert of its own, a method whose model is more than LoRA.
        FileExistsError: if `to` exists.
    """
    saved = read(find(run))
    if not saved.plain_lora:
        raise SavedModelError(
            f"export: the model of {saved.method} in {saved.folder} holds {', '.join(sorted(saved.tensors)[:2])} and "
            f"more that is not a LoRA; expected a model of LoRA experts alone."
        )
    if to.exists():
        raise FileExistsError(f"to: {to} exists; expected a new folder. Choose another name, or delete it.")
    experts = list(dict.fromkeys(expert_of(saved, task) for task in tasks))
    folders = [saved.folder / EXPERTS / name for name in experts]
    parts = [_read(folder) for folder in folders]
    vision = saved.towers.get("vision")
    count = 0 if vision is None else len({name for part in parts for name in part if name.startswith(vision + ".")})
    warnings: tuple[str, ...] = ()
    if count and language_only:
        parts = [{n: lora for n, lora in part.items() if not n.startswith(f"{vision}.")} for part in parts]
        warnings = (LANGUAGE_WARNING.format(count=count),)
    elif count:
        warnings = (VISION_WARNING.format(count=count),)
    if not any(parts):
        raise SavedModelError(
            f"export: the experts of {', '.join(tasks)} are in the vision tower alone, so that nothing would be left; "
            f"expected layers in the language model. Export them without --language-only."
        )
    partial = to.with_name(f".{to.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir(parents=True)
    try:
        if len(parts) == 1 and not language_only and _uniform(parts[0]):
            for name in (CONFIG, WEIGHTS):
                shutil.copyfile(folders[0] / name, partial / name)
        else:
            _write(partial, _joined(parts), json.loads((folders[0] / CONFIG).read_text(encoding="utf-8")))
        os.rename(partial, to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return to, warnings


def expert_of(saved: SavedModel, task: str) -> str:
    """The expert that answers for a task; `SavedModelError` for a task that the model has not learned."""
    if task not in [known["name"] for known in saved.tasks]:
        names = ", ".join(known["name"] for known in saved.tasks)
        raise SavedModelError(f"task: got {task!r}; expected one of {names}, which {saved.folder} has learned.")
    if task in saved.task_experts:
        return saved.task_experts[task]
    if len(saved.experts) != 1:
        raise SavedModelError(f"task: {task!r} has no expert in {saved.folder}; it has {', '.join(saved.experts)}.")
    return saved.experts[0]


# A linear's (A, B, scale).
Lora = tuple[Tensor, Tensor, float]


def _read(folder: Path) -> dict[str, Lora]:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    tensors = load_file(folder / WEIGHTS)
    found = {}
    for key in tensors:
        if key.endswith(A):
            name = key.removeprefix(PREFIX).removesuffix(A)
            a, b = tensors[key], tensors[f"{PREFIX}{name}{B}"]
            alpha = _pattern(config["alpha_pattern"], name, config["lora_alpha"])
            found[name] = (a, b, alpha / (math.sqrt(len(a)) if config["use_rslora"] else len(a)))
    return found


def _pattern(patterns: Mapping[str, float], name: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the end of the name."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _uniform(part: Mapping[str, Lora]) -> bool:
    return len({(len(a), scale) for a, _, scale in part.values()}) == 1


def _joined(parts: Sequence[Mapping[str, Lora]]) -> dict[str, Lora]:
    """The sum of the experts at each linear, all of one rank and with scale 1."""
    rank = sum(max((len(a) for a, _, _ in part.values()), default=0) for part in parts)
    joined = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        held = [part[name] for part in parts if name in part]
        a = torch.cat([a.float() for a, _, _ in held])
        b = torch.cat([scale * b.float() for _, b, scale in held], dim=1)
        missing = rank - len(a)
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
        b = torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1)
        joined[name] = (a, b, 1.0)
    return joined


def _write(folder: Path, matrices: Mapping[str, Lora], like: Mapping[str, Any]) -> None:
    rank = len(next(iter(matrices.values()))[0])
    exact = isinstance(like["target_modules"], str)  # an expression, where an ending would match other modules
    targets: Any = "|".join(map(re.escape, matrices)) if exact else list(matrices)
    config = {
        **like, "r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False,
        "target_modules": targets,
    }  # fmt: skip
    tensors = {}
    for name, (a, b, _) in matrices.items():
        tensors[f"{PREFIX}{name}{A}"], tensors[f"{PREFIX}{name}{B}"] = a.contiguous(), b.contiguous()
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
