# SPDX-License-Identifier: Apache-2.0
"""`model/` in a run's folder: everything that a run has learned, without the base model's weights.

    model/dmole.json             format, base and its digest, processor's digest, method, tasks, routing; sealed
          experts/<expert>/      one stock PEFT LoRA folder for each expert
          method.safetensors     what is not a LoRA: a router, merged weights; only where the method has any
          README.md              the line that loads it

`dmole.json` holds the sha256 of every other file and of itself, so an edited or truncated file is refused by name. The
folder is written under another name and renamed. Nothing in it is pickled.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from dmole.files import JSON, file_digest, put_in_place, sealed_digest, synced_digest, write_tensors
from dmole.methods.base import Method
from dmole_kernels import save_experts

FORMAT = 1
DOCUMENT, EXPERTS, TENSORS, README = "dmole.json", "experts", "method.safetensors", "README.md"


class SavedModelError(ValueError):
    """A saved model that cannot be used; the message names the file and what to do."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """The base model that the experts belong to.

    Attributes:
        model: the registered name, folder or hub id that the run named.
        identity: `dmole.models.identity.base_identity`.
        inputs: the digest of the processor, `VisionLanguageModel.inputs_digest`.
        dtype, quantization, declaration: how it was opened.
    """

    model: str
    identity: Mapping[str, Any]
    inputs: str
    dtype: str | None
    quantization: str | None
    declaration: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """What `read` found in a folder.

    Attributes:
        tasks: name and metric of each task, in the order in which they were learned.
        settings: of the method, as JSON.
        generation: the `evaluation:` settings of the run, with which it answers.
        precision: "no", "bf16" or "fp16": the autocast of the run.
        experts: the names of the experts, each a folder below `experts/`.
        task_experts: the expert of each task that has one of its own.
        towers: the qualified names of the base's towers.
        trained_beside: `Method.trained_beside`.
        origin: the digest of the run's own model, for one that was changed since; None otherwise.
        changes: what was done to it since, oldest first.
        plain_lora: whether the experts, with the routing, are everything that was learned.
        tensors, state: `Method.state()` without the experts' weights, and the prefix that those had in it.
    """

    folder: Path
    method: str
    seed: int
    base: Base
    tasks: tuple[Mapping[str, str], ...]
    settings: Mapping[str, Any]
    generation: Mapping[str, Any]
    precision: str
    experts: tuple[str, ...]
    task_experts: Mapping[str, str]
    towers: Mapping[str, str]
    plain_lora: bool
    trained_beside: Mapping[str, Mapping[str, int]]
    origin: str | None
    changes: tuple[Mapping[str, Any], ...]
    tensors: Mapping[str, Tensor]
    state: JSON
    prefix: str
    digest: str


def write(
    folder: Path,
    method: Method,
    *,
    base: Base,
    tasks: list[dict[str, str]],
    generation: Mapping[str, Any],
    precision: str,
    origin: str | None = None,
    changes: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Write the model of a run that has ended; an existing folder is replaced. Returns the sha256 of its document.

    Args:
        origin, changes: of a model that was changed after its run, see `SavedModel`.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / EXPERTS).mkdir(parents=True)
    tensors, state = method.state()
    names = expert_tensor_names(method.vlm.model)
    inside = {key: name for key in tensors if (name := _suffix_in(key, names))}
    experts = list(dict.fromkeys(name.split(".bank.experts.")[1].split(".")[0] for name in inside.values()))
    prefixes = {key.removesuffix(name) for key, name in inside.items()} or {""}
    assert len(prefixes) == 1, prefixes
    if experts:
        save_experts(method.vlm.model, partial / EXPERTS, experts, base_name=base.model)
    rest = {name: tensor.detach().contiguous() for name, tensor in tensors.items() if name not in inside}
    if rest:
        write_tensors(partial / TENSORS, rest)
    (partial / README).write_text(_readme(method, base, tasks, experts), encoding="utf-8")
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    body = {
        "format": FORMAT,
        "base": dataclasses.asdict(base),
        "method": method.name,
        "seed": method.seed,
        "tasks": tasks,
        "settings": dataclasses.asdict(method.settings),
        "generation": dict(generation),
        "precision": precision,
        "experts": experts,
        "task_experts": method.task_experts(),
        "towers": method.vlm.towers,
        "plain_lora": method.plain_lora,
        "trained_beside": method.trained_beside(),
        "report": method.report(),
        "origin": origin,
        "changes": list(changes),
        "state": {"prefix": prefixes.pop(), "method": state},
        "files": {path.relative_to(partial).as_posix(): synced_digest(path) for path in files},
    }
    document = partial / DOCUMENT
    digest = sealed_digest(body)
    document.write_text(json.dumps({**body, "sha256": digest}, indent=1), encoding="utf-8")
    synced_digest(document)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        # A folder that is not empty cannot be replaced in one step; in between it has the name `old`.
        os.rename(folder, old)
    put_in_place(partial, folder)
    shutil.rmtree(old, ignore_errors=True)
    return digest


def rewrite(saved: SavedModel, method: Method, *, tasks: Sequence[Mapping[str, str]], change: Mapping[str, Any]) -> str:
    """Write a saved model anew after `method` was changed, with the change on record."""
    return write(
        saved.folder,
        method,
        base=saved.base,
        tasks=[dict(task) for task in tasks],
        generation=saved.generation,
        precision=saved.precision,
        origin=saved.origin or saved.digest,
        changes=[*saved.changes, change],
    )


def read(folder: Path) -> SavedModel:
    """Read a saved model; `SavedModelError` by name for a missing, damaged or edited file and for a newer format."""
    body = read_document(folder)
    known = {*body["files"], DOCUMENT}
    extra = sorted(
        name
        for path in folder.rglob("*")
        if path.is_file() and (name := path.relative_to(folder).as_posix()) not in known
    )
    if extra:
        raise SavedModelError(_refusal(folder / extra[0], "is not in dmole.json"))
    check_files(folder, "", body["files"])
    return SavedModel(
        folder=folder,
        method=body["method"],
        seed=body["seed"],
        base=Base(**body["base"]),
        tasks=tuple(body["tasks"]),
        settings=body["settings"],
        generation=body["generation"],
        precision=body["precision"],
        experts=tuple(body["experts"]),
        task_experts=body["task_experts"],
        towers=body["towers"],
        plain_lora=body["plain_lora"],
        trained_beside=body["trained_beside"],
        origin=body["origin"],
        changes=tuple(body["changes"]),
        tensors=load_file(folder / TENSORS) if TENSORS in body["files"] else {},
        state=body["state"]["method"],
        prefix=body["state"]["prefix"],
        digest=body["sha256"],
    )


def check_files(folder: Path, prefix: str, files: Mapping[str, str] | None = None) -> None:
    """Raise `SavedModelError` for a file below `prefix` that is missing or not as `dmole.json` says."""
    for name, digest in (read_document(folder)["files"] if files is None else files).items():
        path = folder / name
        if not name.startswith(prefix):
            continue
        if not path.is_file():
            raise SavedModelError(_refusal(path, "is missing"))
        if file_digest(path) != digest:
            raise SavedModelError(_refusal(path, "was truncated or edited: its sha256 is not that in dmole.json"))


def read_document(folder: Path) -> dict[str, Any]:
    """`dmole.json`, checked by its own digest and format; the other files are not looked at."""
    path = folder / DOCUMENT
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise SavedModelError(_refusal(path, "is missing")) from error
    except (ValueError, RecursionError) as error:
        raise SavedModelError(_refusal(path, "is not JSON: it was truncated or edited")) from error
    if not isinstance(document, dict) or not isinstance(document.get("format"), int):
        raise SavedModelError(_refusal(path, "holds no saved model"))
    if document["format"] > FORMAT:
        # The format comes before the seal: what a later version seals may be sealed in another way.
        raise SavedModelError(
            f"{path} has format {document['format']}; this version of dmole reads up to format {FORMAT}. Update dmole."
        )
    body = {key: value for key, value in document.items() if key != "sha256"}
    if document.get("sha256") != sealed_digest(body):
        raise SavedModelError(_refusal(path, "was edited: its own sha256 does not match"))
    return document


def expert_tensor_names(model: nn.Module) -> set[str]:
    """The qualified names of all experts' parameters in the model."""
    return {name for name, _ in model.named_parameters() if ".bank.experts." in name}


def _suffix_in(key: str, names: set[str]) -> str:
    """The end of `key` that is one of `names`; "" if there is none."""
    parts = key.split(".")
    return next((end for start in range(len(parts)) if (end := ".".join(parts[start:])) in names), "")


def find(folder: Path) -> Path:
    """The saved model that `folder` names: itself, that of a run, or that of the only run of an output folder."""
    if (folder / DOCUMENT).is_file():
        return folder
    if (folder / "model" / DOCUMENT).is_file():
        return folder / "model"
    found = sorted(folder.glob(f"runs/*/model/{DOCUMENT}"))
    if len(found) == 1:
        return found[0].parent
    if found:
        names = ", ".join(str(path.parent.parent) for path in found)
        raise SavedModelError(f"model: got {folder}, which holds {len(found)} runs; expected one of {names}.")
    raise SavedModelError(
        f"model: got {folder}, which has no model/{DOCUMENT}; expected the folder of a finished run, or of its model. "
        f"Check the path, and that the run has ended."
    )


def _readme(method: Method, base: Base, tasks: list[dict[str, str]], experts: list[str]) -> str:
    named = ", ".join(task["name"] for task in tasks) or "none"
    lines = [
        f"# {named}",
        "",
        f"What `{method.name}` has learned on top of `{base.model}`; the base model itself is not in this folder.",
        "",
        "```python",
        "import dmole",
        "",
        'grown = dmole.load("this folder")',
        'print(grown.answer(images=["photo.jpg"], text="What is this?").text)',
        "```",
        "",
    ]
    if experts:
        lines += [f"Each folder of `{EXPERTS}/` is a LoRA adapter in PEFT's format: {', '.join(experts)}.", ""]
    return "\n".join(lines)


def _refusal(path: Path, why: str) -> str:
    return f"{path} {why}. The model cannot be trusted: restore the file, or run again."
