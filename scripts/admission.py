# SPDX-License-Identifier: Apache-2.0
"""Measures whether a small model can learn each task of the mini benchmark and a blind one cannot.

    admitted  iff  Finetune >= max(best constant answer, text-only model, zero-shot) + 10 points

All on validation data. Finetune is the benchmark's own method with its own adapter budget and recipe. The text-only
model is the same with every image, in training and at test, replaced by one gray picture. The best constant answer is
the one that scores best on the validation split itself, among the 200 most frequent training answers: generous to it.

    python scripts/admission.py --output results/admission.csv [--set training.learning_rate=2e-3] [--tasks a,b]
"""

from __future__ import annotations

import csv
import dataclasses
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from rich.console import Console

from dmole.config import RunConfig, load_config
from dmole.data.sample import Sample, Stream, Task
from dmole.methods import method_class
from dmole.metrics import METRICS
from dmole.profile import Profile
from dmole.recipes import RECIPES
from dmole.runs.evaluation import evaluate, generation_queue
from dmole.sources import open_model, open_stream
from dmole.training.acceleration import make_accelerator
from dmole.training.stage_training import StageTraining

MARGIN = 10.0
FIGURES = ("finetune", "zero_shot", "text_only", "constant", "margin")
COLUMNS = ("task", "metric", *FIGURES, "admitted", "well_formed", "constant_answer")


def on_validation(task: Task) -> Task:
    """The task with its validation split in the test's place: nothing here looks at test data."""
    return dataclasses.replace(task, test=task.validation)


def blinded(task: Task, image: Path) -> Task:
    """The task with one gray picture everywhere."""

    def blind(samples: Sequence[Sample]) -> tuple[Sample, ...]:
        return tuple(dataclasses.replace(sample, images=(image,)) for sample in samples)

    return dataclasses.replace(task, train=blind(task.train), validation=blind(task.validation), test=blind(task.test))


def best_constant(task: Task) -> tuple[float, str]:
    """Points and text of the constant answer that scores best on `task.test`."""
    metric = METRICS[task.metric]
    frequent = [answer for answer, _ in Counter(s.answers[0] for s in task.train).most_common(200)]
    return max((metric.evaluate([answer] * len(task.test), task.test), answer) for answer in frequent)


def points(config: RunConfig, task: Task, method_name: str) -> tuple[float, float]:
    """Points and well-formed share on `task.test` of one method trained on `task.train` alone."""
    torch.use_deterministic_algorithms(True)
    vlm = open_model(config)
    method = method_class(method_name)(vlm, config.method_settings(method_name), seed=0)
    stream = Stream(name="admission", tasks=(task,))
    profile = Profile()
    for stage in method.stages(stream):
        method.begin_stage(stage.index, stage.task)
        StageTraining(method, stage, config.training, seed=0, profile=profile).run(lambda _: None)
        method.end_stage(stage.index, stage.task)
    queue = generation_queue(vlm, stream.tasks, config.evaluation.per_device_eval_batch_size)
    row = evaluate(method, stream.tasks, queue, config.evaluation, make_accelerator(config.training), profile=profile)
    return row.points[task.name], row.well_formed[task.name]


def measure(arguments: tuple[RunConfig, Task, Path]) -> dict[str, object]:
    """One line of the table."""
    config, task, gray = arguments
    torch.set_num_threads(1)
    task = on_validation(task)
    constant, answer = best_constant(task)
    zero_shot, _ = points(config, task, "zero_shot")
    finetune, well_formed = points(config, task, "finetune")
    text_only, _ = points(config, blinded(task, gray), "finetune")
    margin = finetune - max(constant, zero_shot, text_only)
    figures = {
        "finetune": finetune,
        "zero_shot": zero_shot,
        "text_only": text_only,
        "constant": constant,
        "margin": margin,
    }
    return {
        "task": task.name,
        "metric": task.metric,
        **{name: round(value, 2) for name, value in figures.items()},
        "admitted": "yes" if margin >= MARGIN else "no",
        "well_formed": round(well_formed, 3),
        "constant_answer": answer,
    }


def main(
    output: Annotated[Path, typer.Option(help="CSV to write.")],
    changes: Annotated[list[str] | None, typer.Option("--set", help="Setting of the recipe, key=value.")] = None,
    tasks: Annotated[str, typer.Option(help="Comma-separated names; all by default.")] = "",
    workers: Annotated[int, typer.Option(help="Tasks measured side by side, one thread each.")] = 2,
) -> None:
    """Writes the table of the admission rule."""
    config = load_config(base=RECIPES["mini"](), overrides=changes or [])
    stream = open_stream(config.stream, Console(stderr=True)).limit(train=config.train_samples)
    chosen = [task for task in stream.tasks if not tasks or task.name in tasks.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        gray = Path(folder) / "gray.png"
        Image.new("RGB", (160, 160), (127, 127, 127)).save(gray)
        with ProcessPoolExecutor(workers) as pool:
            rows = []
            for row in pool.map(measure, [(config, task, gray) for task in chosen]):
                rows.append(row)
                print(row, flush=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    typer.run(main)
