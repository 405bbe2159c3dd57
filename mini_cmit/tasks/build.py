# SPDX-License-Identifier: Apache-2.0
"""Builds the mini benchmark: nine tasks, one folder, the same bytes every time.

The folder is written beside its place and renamed into it, so that an interrupted build leaves nothing that looks like
a stream. `manifest.json` says what it was built from (sizes, seed, the source text of this package, the versions of the
packages that carry the material or draw it) and what is in it (the sha256 of every file). A folder that matches its
manifest is reused, one that is damaged or was built from something else is built again, and a folder without a manifest
was not built here and is refused.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from dmole.machine import usable_cores
from mini_cmit.tasks.building import SPLITS, BuildContext, TaskRows, write_task

STREAM_NAME: Final = "mini"
# In the order of the paper's sequence of forms; a run may reorder them.
TASKS: Final = (
    "icon_captions",
    "map_grounding",
    "poster_captions",
    "icon_questions",
    "number_reading",
    "chart_captions",
    "chart_questions",
    "country_knowledge",
    "molecules",
)
PACKAGES: Final = (
    "bokeh_sampledata",
    "chemicals",
    "comma-deps-bootstrap-icons",
    "countryinfo",
    "dj-lucide",
    "matplotlib",
    "numpy",
    "pillow",
    "rdkit",
    "resvg_py",
    "scikit-learn",
    "shapely",
    "statsmodels",
    "vega-datasets",
)
MANIFEST: Final = "manifest.json"


def build_mini(
    folder: str | Path,
    *,
    seed: int = 0,
    image_side: int = 160,
    train: int = 1500,
    validation: int = 100,
    test: int = 150,
    workers: int | None = None,
) -> Path:
    """Builds the stream in `folder`, or finds it there, and returns the folder.

    `image_side` is in pixels; `train`, `validation` and `test` are samples per task; `workers` processes build the
    tasks in parallel (default: one per usable core). The result does not depend on `workers`, and the first n samples
    of a split are those of a smaller build.

    A script that builds with several workers calls this under `if __name__ == "__main__":`, as every script does that
    spawns processes.

    Raises:
        ValueError: a size is too small, a package is missing, or `folder` holds something that this did not build.
    """
    sizes = {"image_side": image_side, "train": train, "validation": validation, "test": test}
    for name, least in (("image_side", 64), ("train", 2), ("validation", 1), ("test", 1)):
        if sizes[name] < least:
            raise ValueError(f"{name} is {sizes[name]}; expected at least {least}. Leave it out for the default.")
    folder = Path(folder)
    asked = {"stream": STREAM_NAME, "tasks": list(TASKS), "seed": seed, **sizes}
    wanted: dict[str, object] = {**asked, **material_origin()}
    if folder.exists():
        if _matches(folder, wanted):
            return folder
        if any(folder.iterdir()) and not (folder / MANIFEST).is_file():
            raise ValueError(
                f"{folder} exists and has no {MANIFEST}, so it was not built here; expected a free name or an earlier "
                "build. Name another folder."
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        root = Path(temporary) / "stream"
        root.mkdir()
        context = BuildContext(
            root=root, seed=seed, image_side=image_side, train=train, validation=validation, test=test
        )
        metrics = _build_tasks(context, workers)
        (root / "stream.yaml").write_text(_stream_yaml(metrics), encoding="utf-8")
        contents = {task: _digest(root / task) for task in TASKS}
        manifest = {**wanted, "stream.yaml": _sha256(root / "stream.yaml"), "contents": contents}
        (root / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if folder.exists() and _matches(folder, wanted):
            return folder  # another process was faster: the bytes are the same
        if folder.exists():
            # A folder cannot be replaced in one step; the old build leaves with the temporary folder.
            os.replace(folder, Path(temporary) / "old")
        os.replace(root, folder)
    return folder


def task_rows(task: str, context: BuildContext) -> TaskRows:
    """Builds one task: draws its images below `context.root / task` and returns its rows."""
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; expected one of {', '.join(TASKS)}.")
    # Imported by name and late: a worker loads only what its task draws with (rdkit and pandas take seconds).
    rows: TaskRows = importlib.import_module(f"mini_cmit.tasks.{task}").build(context)
    assert rows.name == task, f"{task}.build returned the rows of {rows.name}"
    return rows


def _build_and_write(task: str, context: BuildContext) -> tuple[str, str]:
    rows = task_rows(task, context)
    write_task(context, rows)
    return task, rows.metric


def _build_tasks(context: BuildContext, workers: int | None) -> dict[str, str]:
    """{task: metric} after all of them are written."""
    count = min(len(TASKS), workers if workers is not None else usable_cores())
    if count <= 1:
        return dict(_build_and_write(task, context) for task in TASKS)
    # spawn: forking a process that has started torch's threads can hang.
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        return dict(pool.map(_build_and_write, TASKS, [context] * len(TASKS)))


def _stream_yaml(metrics: dict[str, str]) -> str:
    lines = [f"name: {STREAM_NAME}", "tasks:"]
    lines += [f"  - {{name: {task}, metric: {metrics[task]}, directory: {task}}}" for task in TASKS]
    return "\n".join(lines) + "\n"


def material_origin() -> dict[str, object]:
    """What drawings follow from besides their arguments: the sources of this folder and the packages' versions.

    Raises ValueError for a package that is not installed.
    """
    source = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        source.update(file.name.encode("utf-8") + b"\0" + file.read_bytes())
    missing = []
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        raise ValueError(
            f"the mini benchmark is built from packages that are not installed: {', '.join(missing)}. "
            f"Run `pip install {' '.join(missing)}`."
        )
    return {"source_sha256": source.hexdigest(), "packages": versions}


def _digest(task_folder: Path) -> dict[str, object]:
    """{"images": count, "images_sha256": over their names and bytes, "<split>.jsonl": sha256}.

    All 15,750 images of the whole benchmark take half a second.
    """
    images = sorted((task_folder / "images").iterdir())
    content = hashlib.sha256()
    for image in images:
        data = image.read_bytes()
        content.update(f"{image.name}\0{len(data)}\0".encode() + data)
    digest: dict[str, object] = {"images": len(images), "images_sha256": content.hexdigest()}
    for split in SPLITS:
        digest[f"{split}.jsonl"] = _sha256(task_folder / f"{split}.jsonl")
    return digest


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _matches(folder: Path, wanted: dict[str, object]) -> bool:
    """Whether the folder was built from the same and nothing is missing from it."""
    file = folder / MANIFEST
    if not file.is_file():
        return False
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return False
    if not isinstance(found, dict) or {name: found.get(name) for name in wanted} != wanted:
        return False
    contents = found.get("contents")
    listing = folder / "stream.yaml"
    if not isinstance(contents, dict) or not listing.is_file() or found.get("stream.yaml") != _sha256(listing):
        return False
    needed = [folder / task / name for task in TASKS for name in ("images", *(f"{split}.jsonl" for split in SPLITS))]
    return all(path.exists() for path in needed) and all(contents.get(task) == _digest(folder / task) for task in TASKS)
