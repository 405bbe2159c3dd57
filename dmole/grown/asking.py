# SPDX-License-Identifier: Apache-2.0
"""One question of each task, as an example of what a model has learned."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from dmole.grown.model import GrownModel
from dmole.sources import open_stream


def ask_each_task(grown: GrownModel, run: Path, **changes: Any) -> Iterator[str]:
    """Lines with the question, the reference, the answer and its route, for the first test sample of each task; last,
    the command that asks one of them again.

    Raises ValueError where the model is not in the folder of its run, which names the stream.
    """
    assert grown.folder is not None
    settings = grown.folder.parent / "config.json"
    if not settings.is_file():
        raise ValueError(f"--each-task: {settings} is missing; expected the model in its run's folder.")
    stream = open_stream(json.loads(settings.read_bytes())["config"]["stream"], Console(stderr=True))
    known = [task for task in stream.tasks if task.name in grown.tasks]
    samples = [task.test[0] for task in known]
    named = [task.name for task in known] if grown.method.routed_by == "caller" else None
    answers = grown.answer(
        images=[list(sample.images) for sample in samples],
        text=[sample.instruction for sample in samples],
        task=named,
        **changes,
    )
    for task, sample, answer in zip(known, samples, answers, strict=True):
        yield f"{task.name}: {sample.instruction}"
        yield f"  answer: {answer.text}{'  [cut]' if answer.cut else ''}    reference: {sample.answers[0]}"
        yield f"  route: {answer.route}"
    if samples:
        words = [str(run), *map(str, samples[0].images), samples[0].instruction]
        words += ["--task", named[0]] if named else []
        yield f"ask again: {shlex.join(['dmole', 'ask', *words])}"
