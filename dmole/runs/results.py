# SPDX-License-Identifier: Apache-2.0
"""The files of a run's folder (`dmole.reports.run_files` lists them), from its plan, its position and its rows."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from dmole.config import RunConfig
from dmole.files import JSON, write_json
from dmole.grown.saved import Base
from dmole.grown.saved import write as write_model
from dmole.machine import peak_memory_gib
from dmole.methods.base import Method, Stage
from dmole.reports.routing_statistics import routing_statistics
from dmole.reports.run_files import (
    PROFILE_PARTS,
    SUMMARY_COLUMNS,
    aggregate_columns,
    matrix_of,
    method_columns,
    prediction_line,
    write_csv,
    write_lines,
    write_matrix,
    write_references,
)
from dmole.reports.seals import sealed
from dmole.runs.checkpoint import CheckpointError
from dmole.runs.environment import describe_environment
from dmole.runs.evaluation import Evaluation, final_rows
from dmole.runs.plan import RunPlan
from dmole.runs.position import Position
from dmole.training.symptoms import below_zero_shot, flat_loss, malformed_answers
from dmole_kernels import choose_backend


def write_run_settings(plan: RunPlan, config: RunConfig, accelerator: Accelerator) -> None:
    """config.json and environment.json, which keeps the environment of every start."""
    document = {
        "method": plan.method,
        "seed": plan.seed,
        "order": plan.order,
        "tasks": list(plan.stream.task_names),
        "fingerprint": plan.fingerprint,
        "identity": plan.identity,
        "config": config.to_dict(),
        **({} if plan.extends is None else {"extends": plan.extends}),
    }
    write_json(plan.folder / "config.json", document)
    device = accelerator.device.type
    environment = {
        **describe_environment(),
        "device": device,
        "kernels": choose_backend(device_type=device).name,
        "processes": accelerator.num_processes,
        "base_weights_sha256": plan.identity["base_weights"],
    }
    path = plan.folder / "environment.json"
    if path.exists():
        # What computed the first numbers stays; every later start comes after it.
        try:
            first = json.loads(path.read_bytes())
            environment = {**first, "resumes": [*first.get("resumes", []), environment]}
        except (ValueError, RecursionError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} was truncated or edited; expected what the run was started with. Restore it, or delete "
                f"{plan.folder} to start the run over."
            ) from error
    write_json(path, environment)


def write_run_results(
    plan: RunPlan,
    config: RunConfig,
    method: Method,
    protocol: Sequence[Stage],
    position: Position,
    rows: Mapping[int, Evaluation],
) -> list[str]:
    """Every other file of the run's folder; returns the warnings about tasks that end below the pretrained model.

    Args:
        protocol: `method.stages(plan.stream)`, whatever `evaluation` leaves out of it.
        position: That of the finished run, with the seconds of all its processes' lives.
        rows: The rows of the matrix that were measured.
    """
    folder, tasks = plan.folder, list(plan.stream.task_names)
    matrix = matrix_of({row: result.points for row, result in rows.items()}, tasks)
    write_matrix(folder / "matrix.csv", matrix, tasks)
    write_lines(
        folder / "predictions.jsonl.gz",
        (prediction_line(row, prediction) for row, result in rows.items() for prediction in result.predictions),
    )
    write_references(folder / "references.jsonl.gz", plan.stream)
    write_csv(
        folder / "losses.csv",
        ("stage", "task", "step", "loss"),
        (
            (stage["stage"], stage["task"], step, loss)
            for stage in position.stages
            for step, loss in enumerate(stage["losses"], start=1)
        ),
    )
    saved_model = _save_model(plan, config, method)
    final = final_rows(protocol, tasks)
    points = {row: result.points for row, result in rows.items()}
    worse = below_zero_shot(points.get(0, {}), final, points)
    flat = [flat_loss(stage["stage"], stage["task"], stage["losses"], config.training) for stage in position.stages]
    malformed = [sentence for row in rows if row > 0 for sentence in malformed_answers(row, rows[row], tasks[:row])]
    routing = _routing(tasks, rows)
    # Shares over a part of the tasks would pass for those over all of them.
    whole = len(tasks) in rows and set(rows[len(tasks)].points) == set(tasks)
    last = (routing.get(str(len(tasks))) or {}) if whole else {}
    counts = [stage["trainable_parameters"] for stage in position.stages]
    profile, train_seconds = _profile(position)
    profile["time_baseline"] = method.time_baseline
    summary = {
        "method": plan.method,
        "seed": plan.seed,
        "order": plan.order,
        **aggregate_columns(matrix, [final[task] for task in tasks]),
        "trainable_parameters": round(statistics.fmean(counts)) if counts else 0,
        "train_seconds": round(train_seconds, 3),
        "routing_accuracy": last.get("routing_accuracy"),
        "base_model_share": last.get("base_model_share"),
    }
    assert tuple(summary) == SUMMARY_COLUMNS
    summary |= method_columns(position.method_seconds, method.columns(), plan.method)
    result = {
        "fingerprint": plan.fingerprint,
        "summary": summary,
        "trainable_parameters_by_stage": counts,
        "profile": profile,
        "routing": routing,
        "validation_losses": {stage["task"]: stage["validation"] for stage in position.stages},
        "well_formed": {str(row): result.well_formed for row, result in rows.items()},
        "cut_at_max_new_tokens": {str(row): result.cut for row, result in rows.items()},
        "final_rows": final,
        "not_measured": _not_measured(matrix, tasks, protocol),
        "warnings": [*(sentence for sentence in flat if sentence is not None), *malformed, *worse],
        "method": method.report(),
        "peak_memory_gib": round(peak_memory_gib(), 3),
        "resumes": position.resumes,
        "model": saved_model,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_json(folder / "result.json", sealed(folder, result))
    return worse


def _save_model(plan: RunPlan, config: RunConfig, method: Method) -> str:
    """Writes `model/`; returns the digest of its document."""
    base = Base(
        # A folder by its whole path: the model may be loaded from another place.
        model=str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model,
        identity=method.vlm.base_identity(full=True if config.hash_weights else None),
        inputs=method.vlm.inputs_digest(),
        dtype=config.dtype,
        quantization=config.quantization,
        declaration=dataclasses.asdict(config.declaration),
    )
    return write_model(
        plan.folder / "model",
        method,
        base=base,
        tasks=[{"name": task.name, "metric": task.metric} for task in plan.stream.tasks],
        generation=dataclasses.asdict(config.evaluation),
        precision=config.training.precision,
    )


def _routing(tasks: Sequence[str], rows: Mapping[int, Evaluation]) -> dict[str, dict[str, float]]:
    """`routing_statistics` of every row in which samples were routed."""
    found = {row: routing_statistics(result.predictions, tasks[:row]) for row, result in rows.items() if row > 0}
    return {str(row): shares for row, shares in found.items() if shares}


def _not_measured(matrix: np.ndarray, tasks: Sequence[str], protocol: Sequence[Stage]) -> list[list[JSON]]:
    """[row, task] of each cell that the method's protocol measures and `evaluation` leaves out."""
    planned = [(0, task) for task in tasks]
    planned += [(stage.row, task) for stage in protocol for task in tasks if task in stage.evaluates]
    return [[row, task] for row, task in planned if np.isnan(matrix[row, tasks.index(task)])]


def _profile(position: Position) -> tuple[dict[str, JSON], float]:
    """Where the time went, and how much of it was training."""
    seconds, timings = position.profile, position.method_seconds
    steps = sum(stage["steps"] for stage in position.stages)
    by_part = {part: 1000 * seconds.get(part, 0.0) / steps for part in PROFILE_PARTS} if steps else {}
    train = sum(seconds.get(part, 0.0) for part in (*PROFILE_PARTS, "begin_stage", "end_stage"))
    evaluation = sum(value for part, value in seconds.items() if part.startswith("evaluation_"))
    total = train + evaluation
    profile = {
        "seconds": {part: round(value, 3) for part, value in sorted(seconds.items())},
        "method_seconds": {name: round(value, 3) for name, value in sorted(timings.items())},
        "method_share_of_run": {name: value / total for name, value in sorted(timings.items())} if total else {},
        "evaluation_seconds": round(evaluation, 3),
        "steps": steps,
        "step_ms": sum(by_part.values()) if steps else None,
        "step_ms_by_part": by_part,
    }
    return profile, train
