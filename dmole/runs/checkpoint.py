# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is a folder that is there completely or not at all, and that notices when somebody changed it.

    checkpoints/000042/   manifest.json      sha256 of every other file, and of itself
                          <name>.safetensors  tensors
                          <name>.json         everything else

It is written under another name and renamed: a process killed at any moment leaves either the old checkpoint or the new
one. Nothing is pickled. The newest one is the only one kept, and a damaged newest one is an error, never skipped.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from dmole.files import JSON, file_digest, put_in_place, sealed_digest, synced_digest, write_tensors

MANIFEST = "manifest.json"
VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what to do."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What `load` read: tensors and JSON by file name without its ending."""

    folder: Path
    tensors: dict[str, dict[str, Tensor]]
    documents: dict[str, JSON]


def save(root: Path, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, JSON]) -> Path:
    """Write a new checkpoint below `root`, then delete the older ones. Returns its folder."""
    root.mkdir(parents=True, exist_ok=True)
    finished = _finished(root)
    number = int(finished[-1].name) + 1 if finished else 1
    for leftover in root.glob("*.partial"):
        shutil.rmtree(leftover)
    partial = root / f"{number:06d}.partial"
    partial.mkdir()
    digests: dict[str, str] = {}
    for name, values in tensors.items():
        path = partial / f"{name}.safetensors"
        write_tensors(path, {key: value.detach().contiguous() for key, value in values.items()})
        digests[path.name] = synced_digest(path)
    for name, document in documents.items():
        path = partial / f"{name}.json"
        path.write_text(json.dumps(document), encoding="utf-8")
        digests[path.name] = synced_digest(path)
    body = {"version": VERSION, "files": digests}
    path = partial / MANIFEST
    path.write_text(json.dumps({**body, "sha256": sealed_digest(body)}, indent=1), encoding="utf-8")
    synced_digest(path)
    folder = root / f"{number:06d}"
    put_in_place(partial, folder)
    for old in finished:
        shutil.rmtree(old)
    return folder


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint below `root`."""
    finished = _finished(root)
    return finished[-1] if finished else None


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint, refusing by name any file that is missing, truncated or edited."""
    manifest_path = folder / MANIFEST
    try:
        manifest = json.loads(manifest_path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(_refusal(manifest_path, "is missing")) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(_refusal(manifest_path, "is not JSON: it was truncated or edited")) from error
    if not isinstance(manifest, dict) or "files" not in manifest or "sha256" not in manifest:
        raise CheckpointError(_refusal(manifest_path, "is not a manifest"))
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    if manifest["sha256"] != sealed_digest(body):
        raise CheckpointError(_refusal(manifest_path, "was edited: its own sha256 does not match"))
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            _refusal(manifest_path, f"has version {manifest.get('version')}; this program reads version {VERSION}")
        )
    unknown = sorted({path.name for path in folder.iterdir()} - set(manifest["files"]) - {MANIFEST})
    if unknown:
        raise CheckpointError(_refusal(folder / unknown[0], "is not in the manifest"))
    tensors: dict[str, dict[str, Tensor]] = {}
    documents: dict[str, JSON] = {}
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(_refusal(path, "is missing"))
        if file_digest(path) != digest:
            raise CheckpointError(_refusal(path, "was truncated or edited: its sha256 is not the manifest's"))
        if path.suffix == ".safetensors":
            tensors[path.stem] = load_file(path)
        else:
            documents[path.stem] = json.loads(path.read_bytes())
    return Checkpoint(folder=folder, tensors=tensors, documents=documents)


def _finished(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    # Exactly the names that `save` gives: "007.bak", "2" or a number in other digits are not ours.
    found = [path for path in root.iterdir() if re.fullmatch(r"[0-9]{6}|[1-9][0-9]{6,}", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def _refusal(path: Path, why: str) -> str:
    return f"{path} {why}. The checkpoint cannot be trusted: restore the file, or delete {path.parent} to start over."
