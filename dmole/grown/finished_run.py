# SPDX-License-Identifier: Apache-2.0
"""A finished run read back as if it stood before one more stage: its data, its settings, its rows and its position."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dmole.config import RunConfig, build_config, fingerprint
from dmole.data.reading import read_stream
from dmole.data.sample import Stream
from dmole.files import JSON
from dmole.grown.saved import SavedModel, SavedModelError, find, read
from dmole.models.vision_language import VisionLanguageModel
from dmole.reports.stored import StoredRun, read_csv, read_json, read_predictions, read_run
from dmole.runs.evaluation import Evaluation, Prediction, score
from dmole.runs.plan import plan_runs
from dmole.runs.position import Position
from dmole.sources import limited, open_stream

TOLERANCE = 1e-6  # as in `dmole verify`


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run's folder, read.

    Attributes:
        saved: its model, as the run left it.
        stored: result.json and matrix.csv.
        document: config.json.
        config: its configuration with its own method, seed and order alone.
        stream: its tasks, in the order in which they were learned.
        added: the folders of those that are not in `config.stream`, but were added by `extend`.
    """

    folder: Path
    saved: SavedModel
    stored: StoredRun
    document: dict[str, JSON]
    config: RunConfig
    stream: Stream
    added: tuple[str, ...]

    def check(self, model: VisionLanguageModel, *, processes: int) -> None:
        """Raise SavedModelError unless data, model and settings are those of the run."""
        (plan,) = plan_runs(self.config, self.stream, model, processes=processes)
        was = {key: value for key, value in self.document["identity"].items() if key != "extends"}
        changed = sorted(key for key in {*was, *plan.identity} if was.get(key) != plan.identity.get(key))
        if changed:
            names = {"stream": "stream (the data of its tasks)"}
            raise SavedModelError(
                f"run: {self.folder} was made with another {', '.join(names.get(key, key) for key in changed)} than is "
                f"here now; expected the same, because the rows of one matrix are compared. Restore it, or run anew."
            )

    def rows(self) -> dict[int, Evaluation]:
        """Its rows of the matrix, from its raw predictions; SavedModelError where they do not give matrix.csv."""
        said: dict[int, dict[str, dict[str, Prediction]]] = {}
        for line in read_predictions(self.folder):
            prediction = Prediction(
                task=line.task, id=line.id, text=line.prediction, route=line.route, cut=bool(line.cut)
            )
            said.setdefault(line.stage, {}).setdefault(line.task, {})[line.id] = prediction
        found = {}
        for row, by_task in sorted(said.items()):
            measured = [task for task in self.stream.tasks if task.name in by_task]
            whole = all({sample.id for sample in task.test} == set(by_task[task.name]) for task in measured)
            if not whole or len(measured) != len(by_task):
                raise SavedModelError(self._damaged("predictions.jsonl.gz", f"row {row} has other samples"))
            found[row] = score(measured, [one for answers in by_task.values() for one in answers.values()])
        for row in range(len(self.stream.tasks) + 1):
            points = found[row].points if row in found else {}
            for place, task in enumerate(self.stream.tasks):
                cell, value = self.stored.matrix[row, place], points.get(task.name)
                if (value is None) != bool(cell != cell) or (value is not None and abs(cell - value) > TOLERANCE):
                    raise SavedModelError(self._damaged("matrix.csv", f"row {row}, {task.name}, differs"))
        return found

    def position(self, planned_steps: list[int]) -> Position:
        """Where the run stands once its last stage was tested, without the digests of its rows."""
        result = self.stored.result
        losses: dict[str, list[float]] = {}
        for stage, _, _, loss in read_csv(self.folder / "losses.csv")[1]:
            losses.setdefault(stage, []).append(float(loss))
        try:
            stages = [
                {
                    "stage": number,
                    "task": task,
                    "steps": len(losses[str(number)]),
                    "planned_steps": planned_steps[number - 1],
                    "trainable_parameters": result["trainable_parameters_by_stage"][number - 1],
                    "losses": losses[str(number)],
                    "validation": result["validation_losses"][task],
                }
                for number, task in enumerate(self.stream.task_names, start=1)
            ]
            return Position(
                stage=len(stages),
                stages=stages,
                profile=dict(result["profile"]["seconds"]),
                method_seconds=dict(result["profile"]["method_seconds"]),
                resumes=list(result["resumes"]),
            )
        except (KeyError, IndexError, TypeError) as error:
            raise SavedModelError(self._damaged("losses.csv", f"with result.json it lacks {error}")) from error

    def _damaged(self, file: str, why: str) -> str:
        return (
            f"{self.folder / file}: {why}; expected what the run wrote. Restore it: dmole verify "
            f"{self.folder.parent.parent} lists all differences."
        )


def read_finished(run: Path, console: Console) -> FinishedRun:
    """Read the run whose folder, output folder or model folder `run` is.

    Raises:
        SavedModelError: for a model that is not in a run's folder or was changed since, and edited settings.
        DataError, ConfigError: for a stream that is gone or damaged.
    """
    saved = read(find(run))
    folder = saved.folder.parent
    if not (folder / "result.json").is_file():
        raise SavedModelError(
            f"run: {saved.folder} is not in the folder of a finished run; expected one. Give the run."
        )
    stored, document = read_run(folder), read_json(folder / "config.json")
    _check_model(saved, stored)
    identity = document.get("identity") if isinstance(document, dict) else None
    if not isinstance(identity, dict) or document.get("fingerprint") != fingerprint(identity):
        raise SavedModelError(f"{folder / 'config.json'} was edited: its fingerprint does not match. Restore it.")
    config = build_config(document.get("config") or {}).replace(
        methods=(stored.method,), seeds=(stored.seed,), orders=(",".join(stored.tasks),)
    )
    added = tuple((document.get("extends") or {}).get("tasks", ()))
    stream = joined([open_stream(config.stream, console), *(read_task(Path(task)) for task in added)])
    return FinishedRun(
        folder=folder,
        saved=saved,
        stored=stored,
        document=document,
        config=config,
        stream=limited(stream, config).reorder(stored.tasks),
        added=added,
    )


def _check_model(saved: SavedModel, stored: StoredRun) -> None:
    if saved.changes:
        changes = "; ".join(", ".join(f"{key} {value}" for key, value in change.items()) for change in saved.changes)
        raise SavedModelError(
            f"model: {saved.folder} was changed after its run ({changes}); expected the model as the run left it, "
            f"because its rows of the matrix were measured with that one. Extend first, then change the new model."
        )
    if saved.digest != stored.result.get("model"):
        raise SavedModelError(
            f"model: {saved.folder} is not the one that the run in {stored.folder} left; expected the digest in its "
            f"result.json. Restore the folder."
        )


def read_task(folder: Path) -> Stream:
    """A stream of one task: a folder with a stream.yaml that lists one. ValueError for another number of tasks."""
    stream = read_stream(folder)
    if len(stream.tasks) != 1:
        raise ValueError(
            f"task: got {folder}, whose stream.yaml lists {len(stream.tasks)} tasks "
            f"({', '.join(stream.task_names)}); expected one. Give a folder with a stream.yaml of one task."
        )
    return stream


def joined(streams: list[Stream]) -> Stream:
    """The tasks of all of them, one stream after another, under the first one's name."""
    sizes: dict[Any, Any] = {}
    for stream in streams:
        sizes |= stream.image_sizes
    tasks = tuple(task for stream in streams for task in stream.tasks)
    return dataclasses.replace(streams[0], tasks=tasks, image_sizes=sizes)
