# SPDX-License-Identifier: Apache-2.0
"""Signs that a run does not learn, found in its own numbers: printed when they appear, and kept in result.json.

    flat loss           the last tenth of a stage's losses is not below the first tenth by 2 % of it
    no answer's form    every answer to a task that was learned lacks the form of an answer (0 % well-formed)
    below zero-shot     a task's final score is below that of the pretrained model

Each sign is one sentence that says what was seen and what to check. None of them stops a run.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from dmole.runs.evaluation import Evaluation
from dmole.training.settings import TrainingSettings

SHORTEST = 20  # steps: below it a tenth of the losses is one or two batches
SMALLEST_FALL = 0.02
# Nats per token: a loss that starts here has nothing left to fall by.
LEARNED = 0.05


def flat_loss(stage: int, task: str, losses: Sequence[float], settings: TrainingSettings) -> str | None:
    """The sentence for a stage whose loss did not fall, else None."""
    if len(losses) < SHORTEST:
        return None
    tenth = len(losses) // 10
    first, last = statistics.fmean(losses[:tenth]), statistics.fmean(losses[-tenth:])
    if first <= LEARNED or last < (1 - SMALLEST_FALL) * first:
        return None
    return (
        f"stage {stage} ({task}): the loss is flat, {first:.3f} in its first {tenth} steps and {last:.3f} in its last "
        f"{tenth}. Raise training.learning_rate (now {settings.learning_rate:g}) or the number of epochs, and check "
        "the answers in the training data."
    )


def malformed_answers(row: int, result: Evaluation, learned: Sequence[str]) -> list[str]:
    """A sentence for each task of `learned` of which no answer in this row has the form of an answer."""
    found = []
    for task, share in result.well_formed.items():
        if share > 0 or task not in learned:
            continue
        example = next(prediction.text for prediction in result.predictions if prediction.task == task)
        cut = result.cut[task]
        limit = f" {cut} of them are cut: raise evaluation.max_new_tokens." if cut else ""
        found.append(
            f"after stage {row}, task {task}: 0 % of the answers are well-formed, for example {example[:60]!r}."
            f"{limit} Compare it with the answers in the training data and with the task's metric."
        )
    return found


def below_zero_shot(
    zero_shot: Mapping[str, float], final_rows: Mapping[str, int], points: Mapping[int, Mapping[str, float]]
) -> list[str]:
    """A sentence for each task that ends below the pretrained model; tasks without both scores are left out."""
    found = []
    for task, row in final_rows.items():
        final, before = points.get(row, {}).get(task), zero_shot.get(task)
        if row > 0 and final is not None and before is not None and final < before:
            found.append(
                f"task {task} ends at {final:.1f} points, below the pretrained model's {before:.1f}. "
                "Training cost this task more than it gave: compare its column of matrix.csv stage by stage."
            )
    return found
