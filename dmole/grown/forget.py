# SPDX-License-Identifier: Apache-2.0
"""One task less: its expert leaves the routing, and the folder.

In training, older experts are active beside the new one (`Method.trained_beside`). An expert that was trained beside
the forgotten one learned what to add to its output, so its answers may be worse afterwards. Samples that did not use
the forgotten expert get the same answers as before, to the bit.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

from dmole.grown.loading import open_saved, restore
from dmole.grown.saved import SavedModel, SavedModelError, find, read, rewrite


@dataclass(frozen=True, kw_only=True)
class Consequences:
    """What forgetting a task changes.

    Attributes:
        beside: by task whose expert was trained beside the forgotten one, how many of its training samples had it.
        rerouted: by task, how many of its test answers at the end of the run used the forgotten expert.
        answers: by task, how many test answers there were.
    """

    task: str
    beside: dict[str, int]
    rerouted: dict[str, int]
    answers: dict[str, int]

    def __str__(self) -> str:
        lines = [f"forgetting {self.task}:"]
        for task, count in self.beside.items():
            lines.append(f"  {task} was trained beside its expert, for {count} of its samples")
        if not self.beside:
            lines.append("  no other expert was trained beside it")
        for task, count in self.rerouted.items():
            if count:
                lines.append(f"  {task}: {count} of {self.answers[task]} test answers used it, and will change")
        unchanged = sum(self.answers.values()) - sum(self.rerouted.values())
        lines.append(f"  {unchanged} of {sum(self.answers.values())} test answers never used it and stay as they are")
        return "\n".join(lines)


def consequences(run: Path, task: str) -> Consequences:
    """What `forget` would change, from the saved model and the run's predictions; nothing is changed.

    Raises SavedModelError for a task that the model has not learned or that has no expert of its own.
    """
    saved = read(find(run))
    _check(saved, task)
    beside = {other: counts[task] for other, counts in saved.trained_beside.items() if counts.get(task)}
    rerouted: dict[str, int] = {}
    answers: dict[str, int] = {}
    for name, route in _final_routes(saved.folder.parent):
        answers[name] = answers.get(name, 0) + 1
        rerouted[name] = rerouted.get(name, 0) + (task in route)
    return Consequences(task=task, beside=beside, rerouted=rerouted, answers=answers)


def forget(run: Path, task: str, *, keep_weights: bool = False) -> Path:
    """Take a task out of a saved model, in place; returns the model's folder.

    Args:
        keep_weights: take its expert out of the routing only: callers that name the task still get it.

    Raises SavedModelError as `consequences`.
    """
    saved = read(find(run))
    _check(saved, task)
    method = restore(saved, open_saved(saved))
    method.forget(task, keep_weights=keep_weights)
    kept = [known for known in saved.tasks if keep_weights or known["name"] != task]
    rewrite(saved, method, tasks=kept, change={"forget": task, "keep_weights": keep_weights})
    return saved.folder


def _check(saved: SavedModel, task: str) -> None:
    if task not in saved.task_experts:
        names = ", ".join(saved.task_experts) or "none: its tasks share their weights"
        raise SavedModelError(f"task: got {task!r}; expected one with an expert of its own in {saved.folder}: {names}.")


def _final_routes(run: Path) -> list[tuple[str, tuple[str, ...]]]:
    """(task, route) of each final test answer of the run; [] where the model is not in a run's folder."""
    result, predictions = run / "result.json", run / "predictions.jsonl.gz"
    if not (result.is_file() and predictions.is_file()):
        return []
    rows = json.loads(result.read_bytes())["final_rows"]
    with gzip.open(predictions, "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return [(said["task"], tuple(said["route"] or ())) for said in lines if said["stage"] == rows[said["task"]]]
