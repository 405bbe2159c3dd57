# SPDX-License-Identifier: Apache-2.0
"""Is one method better than another? Paired differences of AVG, Last and BWT with two intervals.

Runs are paired by seed and order of tasks, so that what both share (data order, base model, test set) cancels.
- over seeds: Student's t interval of the per-seed differences; "would another seed say the same";
- over test samples: percentile bootstrap inside each task, the seeds averaged; "would another test set say the same".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dmole.reports.continual import (
    Array,
    Interval,
    aggregates,
    paired_bootstrap,
    paired_t_interval,
    per_sample_contributions,
)
from dmole.reports.stored import ResultsError, StoredRun, read_predictions, read_references, scored_by
from dmole.reports.tables import Table

STATISTICS = ("AVG", "Last", "BWT")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`first` minus `second` in one statistic; positive means that `first` is better."""

    first: str
    second: str
    order: str
    statistic: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    over_seeds: Interval | None
    """None with a single seed: no spread can be estimated from one difference."""
    over_samples: Interval


def compare(
    runs: Sequence[StoredRun], first: str, second: str, *, level: float = 0.95, resamples: int = 10_000
) -> list[Comparison]:
    """The statistics of `first` minus `second` for every order in which both have run with a common seed.

    A statistic is left out where a cell that it needs was not measured: only Last for `evaluation.stages=last`.
    Raises ResultsError (a ValueError) if no such pair with complete last rows exists.
    """
    by_key = {(run.method, run.order, run.seed): run for run in runs if not np.isnan(run.matrix[-1]).any()}
    found: list[Comparison] = []
    for order in dict.fromkeys(run.order for run in runs):
        seeds = sorted(s for m, o, s in by_key if m == first and o == order and (second, order, s) in by_key)
        if not seeds:
            continue
        pairs = [(by_key[first, order, seed], by_key[second, order, seed]) for seed in seeds]
        per_sample = _sample_differences(pairs)
        for statistic in STATISTICS:
            values = [(_value(one, statistic), _value(other, statistic)) for one, other in pairs]
            differences = [mine - theirs for mine, theirs in values if mine is not None and theirs is not None]
            if len(differences) < len(values):
                continue
            found.append(
                Comparison(
                    first=first,
                    second=second,
                    order=order,
                    statistic=statistic,
                    seeds=tuple(seeds),
                    differences=tuple(differences),
                    over_seeds=paired_t_interval(differences, level=level) if len(differences) > 1 else None,
                    over_samples=paired_bootstrap(per_sample[statistic], level=level, resamples=resamples),
                )
            )
    if not found:
        raise ResultsError(
            f"{first} and {second} have no common seed and order with complete last rows; expected at least one. "
            f"Run both with the same --seed, and with evaluation.stages all or last."
        )
    return found


def _value(run: StoredRun, statistic: str) -> float | None:
    computed = aggregates(run.matrix, run.final_rows)
    return {"AVG": computed.avg, "Last": computed.last, "BWT": computed.bwt}[statistic]


def _sample_differences(pairs: Sequence[tuple[StoredRun, StoredRun]]) -> dict[str, list[Array]]:
    """For each statistic, one array per task: the mean over seeds of what each test sample contributes to it."""
    tasks = pairs[0][0].tasks
    if any(run.tasks != tasks for pair in pairs for run in pair):
        raise ResultsError("the runs to compare have different tasks; expected the same ones in the same order.")
    totals: dict[str, list[Array]] = {statistic: [] for statistic in STATISTICS}
    scores = [(sample_points(one), sample_points(other)) for one, other in pairs]
    for i, task in enumerate(tasks, start=1):
        contributions = [
            (per_sample_contributions(one[task], i), per_sample_contributions(other[task], i)) for one, other in scores
        ]
        for statistic in contributions[0][0]:
            gains = [one[statistic] - other[statistic] for one, other in contributions]
            totals[statistic].append(np.mean(gains, axis=0))
    return totals


def sample_points(run: StoredRun) -> dict[str, Array]:
    """By task: [N + 1, S], the points of each test sample after each stage, in the order of the references.

    NaN for a stage after which the task was not measured.
    """
    references = read_references(run.folder)
    said = {(p.stage, p.task, p.id): p.prediction for p in read_predictions(run.folder)}
    points: dict[str, Array] = {}
    for task in run.tasks:
        rows = []
        for stage in range(len(run.tasks) + 1):
            if np.isnan(run.matrix[stage, run.tasks.index(task)]):
                rows.append([float("nan")] * len(references.get(task, [])))
                continue
            missing = [r.id for r in references.get(task, []) if (stage, task, r.id) not in said]
            if missing or task not in references:
                raise ResultsError(
                    f"{run.folder}: stage {stage}, task {task} lacks predictions; expected one per reference. "
                    "Run `dmole verify` on the results."
                )
            texts = [said[stage, task, reference.id] for reference in references[task]]
            rows.append(scored_by(references[task]).score_samples(texts, references[task]))
        points[task] = 100.0 * np.asarray(rows, dtype=np.float64)
    return points


def comparison_table(comparisons: Sequence[Comparison], *, level: float = 0.95) -> Table:
    """The comparisons as a table; an interval that excludes zero is marked."""
    rows = []
    for item in comparisons:
        rows.append(
            (
                f"{item.first} - {item.second}",
                item.order,
                item.statistic,
                "-" if item.over_seeds is None else _marked(item.over_seeds),
                _marked(item.over_samples),
                str(len(item.seeds)),
            )
        )
    percent = f"{100 * level:.0f} %"
    return Table(
        title="Paired differences",
        columns=("methods", "order", "statistic", f"{percent} over seeds (t)", f"{percent} over test samples", "seeds"),
        rows=tuple(rows),
        caption="points, mean [low, high]; * excludes zero; over test samples: paired bootstrap inside each task",
    )


def _marked(interval: Interval) -> str:
    return f"{interval}{' *' if interval.excludes_zero else ''}"
