# SPDX-License-Identifier: Apache-2.0
"""A stock PEFT LoRA, trained anywhere on the same base, becomes the expert of a new task in a saved model.

Its weights are read as they are. What sends samples to it, the task's autoencoder and threshold, is trained from
samples of the task, as after a stage of D-MoLE (Eq. 9). Samples whose route does not hold it answer as before.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from safetensors import safe_open
from torch import nn

from dmole.files import file_digest
from dmole.grown.export import CONFIG, PREFIX, WEIGHTS, A
from dmole.grown.finished_run import read_task
from dmole.grown.loading import open_saved, restore
from dmole.grown.saved import SavedModel, SavedModelError, find, read, rewrite
from dmole.methods.base import Method


def import_expert(
    run: str | Path, lora: str | Path, task_folder: str | Path, *, to: str | Path | None = None, base: str | None = None
) -> tuple[Path, tuple[str, ...]]:
    """Add a LoRA folder to a saved model; returns the folder of the model and what to know about it.

    Args:
        run: the folder of a run or of its model.
        lora: a folder of PEFT: adapter_config.json and adapter_model.safetensors.
        task_folder: a folder with a stream.yaml that lists one task, whose `train` split the router learns from.
        to: a new folder for the changed model; None changes the run's own, with the change on record in dmole.json.
        base: where the base model is now; None is the folder or hub id that the run used.

    Raises:
        SavedModelError: for a damaged model, another base, a task name that the model has.
        ValueError: for a method without a router; anything but plain LoRA in safetensors (DoRA, a trained bias); a
            place that the model does not have or that is no candidate; other shapes; data that cannot be used.
        FileExistsError: if `to` exists.
    """
    saved, lora = read(find(Path(run))), Path(lora)
    (task,) = read_task(Path(task_folder)).tasks
    known = dict.fromkeys([*(one["name"] for one in saved.tasks), *saved.task_experts])
    if task.name in known:
        raise SavedModelError(
            f"task: got {task.name!r}, which {saved.folder} has ({', '.join(known)}); expected a new name. Rename it "
            f"in its stream.yaml."
        )
    if to is not None and Path(to).exists():
        raise FileExistsError(f"to: {to} exists; expected a new folder. Choose another name, or delete it.")
    method = restore(saved, open_saved(saved, base=base))
    _check_candidates(method, lora)
    method.adopt(task, lora)
    expert = method.task_experts()[task.name]
    change = {"import": task.name, "expert": expert, "sha256": file_digest(lora / WEIGHTS)}
    target = saved if to is None else dataclasses.replace(saved, folder=Path(to))
    rewrite(target, method, tasks=[*saved.tasks, {"name": task.name, "metric": task.metric}], change=change)
    return target.folder, _notes(saved, lora)


def _check_candidates(method: Method, lora: Path) -> None:
    """Raise ValueError for linears of the model that are no candidates; `load_experts` checks everything else."""
    if not (lora / WEIGHTS).is_file():
        return
    with safe_open(lora / WEIGHTS, framework="pt") as file:
        places = [key.removeprefix(PREFIX).removesuffix(A) for key in file.keys() if key.endswith(A)]  # noqa: SIM118
    candidates = {name for names in method.candidates.values() for name in names}
    linears = {name for name, module in method.vlm.model.named_modules() if isinstance(module, nn.Linear)}
    outside = [place for place in places if place in linears - candidates]
    if outside:
        raise ValueError(
            f"lora: {lora} has {outside[0]!r} ({len(outside)} such layers), which is no candidate of this model; "
            f"expected some of its {len(candidates)} candidates, such as {min(candidates)!r}. Train the LoRA without, "
            f"or a model with wider `candidates`."
        )


def _notes(saved: SavedModel, lora: Path) -> tuple[str, ...]:
    """A LoRA names its base, but not which weights that had."""
    named = json.loads((lora / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not named or Path(named).name == Path(saved.base.model).name:
        return ()
    return (f"{lora / CONFIG} names the base {named}; this model's is {saved.base.model}. Only shapes were compared.",)
