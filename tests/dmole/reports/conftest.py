# SPDX-License-Identifier: Apache-2.0
"""A results folder written by hand: two methods, two seeds, three tasks of four samples, every file a run leaves.

Nothing here uses the code that writes results in production: what `verify` accepts must be what the format says.
"""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dmole.config import fingerprint

TASKS = ("boxes", "words", "letters")
METRICS = {"boxes": "iou", "words": "exact_match", "letters": "option_letter"}
ANSWERS = {"boxes": "10 10 60 60", "words": "Europe", "letters": "B"}
WRONG = {"boxes": "70 70 90 90", "words": "Asia", "letters": "A"}
SAMPLES = 4

# Samples right out of four, by method: rows are stages 0..3, columns TASKS.
RIGHT = {
    "keeper": [[0, 1, 0], [4, 1, 0], [4, 3, 1], [4, 3, 4]],
    "loser": [[0, 1, 0], [4, 1, 0], [1, 3, 1], [0, 1, 4]],
}


def write_gzip_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))


def write_csv(path: Path, rows: list[list[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def write_run(results: Path, method: str, seed: int, right: list[list[int | None]], *, routed: bool) -> dict[str, Any]:
    """One run folder; returns its row of summary.csv. The aggregates are worked out here, by the formulas."""
    folder = results / "runs" / f"{method}-seed{seed}-default"
    folder.mkdir(parents=True)
    n = len(TASKS)
    identity = {"method": method, "seed": seed}
    config = {
        "method": method,
        "seed": seed,
        "order": "default",
        "tasks": list(TASKS),
        "identity": identity,
        "fingerprint": fingerprint(identity),
        "config": {},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps({"python": "3"}))
    references, predictions = [], []
    for task in TASKS:
        for k in range(SAMPLES):
            options = ["x", "y"] if task == "letters" else []
            references.append(
                {
                    "task": task,
                    "id": f"{task}{k}",
                    "metric": METRICS[task],
                    "answers": [ANSWERS[task]],
                    "options": options,
                }
            )
    matrix: list[list[float | None]] = []
    routing: dict[str, dict[str, float]] = {}
    for stage, row in enumerate(right):
        matrix.append([None if count is None else 100 * count / SAMPLES for count in row])
        own = 0
        for i, task in enumerate(TASKS):
            for k in range(SAMPLES if row[i] is not None else 0):
                good = k < (row[i] or 0)
                said = ANSWERS[task] if good else WRONG[task]
                route: list[str] | None = None
                if routed and stage > 0:
                    route = [task] if i < stage and k > 0 else []
                    own += i < stage and k > 0
                predictions.append(
                    {"stage": stage, "task": task, "id": f"{task}{k}", "prediction": said, "route": route}
                )
        if routed and stage > 0:
            known = stage * SAMPLES
            routing[str(stage)] = {
                "samples": known,
                "routing_accuracy": own / known,
                "routing_accuracy_any": own / known,
                "base_model_share": 1 - own / known,
            }
            if stage < n:
                routing[str(stage)]["unseen_base_model_share"] = 1.0
    write_gzip_lines(folder / "references.jsonl.gz", references)
    write_gzip_lines(folder / "predictions.jsonl.gz", predictions)
    cells = [["" if value is None else value for value in row] for row in matrix]
    write_csv(folder / "matrix.csv", [["stage", *TASKS], *([t, *row] for t, row in enumerate(cells))])
    a = [[0.0 if value is None else value for value in row] for row in matrix]
    complete = all(value is not None for row in matrix for value in row)
    avg = sum(a[t][i] for t in range(1, n + 1) for i in range(n)) / n / n
    last = sum(a[n]) / n if complete else sum(a[i + 1][i] for i in range(n)) / n
    bwt = sum(sum(a[t][i] - a[i + 1][i] for t in range(i + 2, n + 1)) / (n - 1 - i) for i in range(n - 1)) / (n - 1)
    summary = {
        "method": method,
        "seed": seed,
        "order": "default",
        "AVG": avg if complete else None,
        "Last": last,
        "BWT": bwt if complete else None,
        "trainable_parameters": 1000,
        "train_seconds": 12.5,
        "proxy_seconds": 0.5 if routed else 0.0,
        "router_seconds": 0.25 if routed else 0.0,
        "routing_accuracy": routing["3"]["routing_accuracy"] if routed else None,
        "base_model_share": routing["3"]["base_model_share"] if routed else None,
    }
    well_formed = {
        str(t): {task: 1.0 for i, task in enumerate(TASKS) if matrix[t][i] is not None}
        for t in range(n + 1)
        if any(value is not None for value in matrix[t])
    }
    result = {
        "summary": summary,
        "trainable_parameters_by_stage": [1000, 1001, 999],
        "routing": routing,
        "well_formed": well_formed,
        "profile": {"step_ms": 20.0 if method == "keeper" else 10.0, "evaluation_seconds": 7.5, "steps": 2 * n},
    }
    losses = [[stage, task, step, 1.0 / step] for stage, task in enumerate(TASKS, start=1) for step in (1, 2)]
    write_csv(folder / "losses.csv", [["stage", "task", "step", "loss"], *losses])
    (folder / "result.json").write_text(json.dumps(result))
    return summary


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A results folder in which everything is as it should be."""
    folder = tmp_path / "results"
    rows = []
    for method, right in RIGHT.items():
        for seed in (0, 1):
            # Seeds differ in one cell, so that there is a spread.
            mine: list[list[int | None]] = [list(row) for row in right]
            mine[3][1] = 3 - seed if method == "keeper" else 1
            rows.append(write_run(folder, method, seed, mine, routed=method == "keeper"))
    diagonal: list[list[int | None]] = [[0, 1, 0], [4, None, None], [None, 3, None], [None, None, 4]]
    rows.append(write_run(folder, "finetune", 0, diagonal, routed=False))
    header = list(rows[0])
    write_csv(folder / "summary.csv", [header, *(["" if row[c] is None else row[c] for c in header] for row in rows)])
    profile = [
        [row["method"], row["seed"], row["order"], 20.0 if row["method"] == "keeper" else 10.0, ""] for row in rows
    ]
    write_csv(folder / "profile.csv", [["method", "seed", "order", "step_ms", "times_seq_ft"], *profile])
    return folder
