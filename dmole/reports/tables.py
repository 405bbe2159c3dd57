# SPDX-License-Identifier: Apache-2.0
"""Tables of results: one plain value (`Table`), shown on a terminal by rich or written as Markdown.

Every table over several seeds shows `mean +- standard deviation` (n - 1) and says the number of seeds; the convention
behind AVG, Last and BWT stands in the caption.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import rich.table
from rich.markup import escape

from dmole.reports.continual import other_conventions
from dmole.reports.stored import StoredRun, ratio_columns, read_csv, read_predictions, read_references, scored_by

CONVENTION = (
    "AVG, Last, BWT: D-MoLE Eq. 16-18, mean over tasks, points; stage 0 (untrained) counts in none of them, except "
    "that Last is stage 0 for a method without stages and the diagonal for one that tests each stage's own task only"
)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A caption, column names, rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def rich(self) -> rich.table.Table:
        """For a terminal."""
        shown = rich.table.Table(title=escape(self.title), caption=escape(self.caption) or None)
        for i, column in enumerate(self.columns):
            shown.add_column(escape(column), justify="left" if i == 0 else "right", no_wrap=i == 0)
        for row in self.rows:
            shown.add_row(*(escape(cell) for cell in row))
        return shown

    def markdown(self) -> str:
        """GitHub's table syntax, the caption below."""
        cells = [[cell.replace("|", "\\|") for cell in row] for row in (self.columns, *self.rows)]
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        lines.insert(1, "|" + "|".join(["---"] + ["---:"] * (len(self.columns) - 1)) + "|")
        return "\n".join([*lines, *(["", self.caption + "."] if self.caption else [])]) + "\n"


def groups(runs: Iterable[StoredRun]) -> dict[tuple[str, str], list[StoredRun]]:
    """Runs by (method, order), each group sorted by seed."""
    grouped: dict[tuple[str, str], list[StoredRun]] = {}
    for run in sorted(runs, key=lambda run: (run.order, run.method, run.seed)):
        grouped.setdefault((run.method, run.order), []).append(run)
    return grouped


NOT_MEASURED = "not measured"


class NotMeasured(float):
    """A number that needs a cell that `evaluation.stages` or `evaluation.zero_shot` left out of the matrix."""

    def __new__(cls) -> NotMeasured:
        return super().__new__(cls, math.nan)


def spread(values: Sequence[float | None], digits: int = 2) -> str:
    """`mean +- standard deviation`, the mean alone for one value, "-" where any value is undefined.

    "not measured" where any value is `NotMeasured`: never a mean over the runs that are left.
    """
    if any(isinstance(value, NotMeasured) for value in values):
        return NOT_MEASURED
    present = [value for value in values if value is not None and not math.isnan(value)]
    if not present or len(present) != len(values):
        return "-"
    mean = f"{statistics.fmean(present):.{digits}f}"
    return mean if len(present) == 1 else f"{mean} ± {statistics.stdev(present):.{digits}f}"


def _label(method: str, order: str, several_orders: bool) -> str:
    return f"{method} ({order})" if several_orders else method


def _by_group(
    title: str,
    runs: Sequence[StoredRun],
    columns: Mapping[str, Callable[[StoredRun], float | None]],
    *,
    caption: str = "",
    digits: Mapping[str, int] | None = None,
    seeds: bool = True,
) -> Table:
    grouped = groups(runs)
    several = len({order for _, order in grouped}) > 1
    rows = []
    for (method, order), members in grouped.items():
        cells = [
            spread([value(run) for run in members], (digits or {}).get(name, 2)) for name, value in columns.items()
        ]
        rows.append((_label(method, order, several), *cells, *([str(len(members))] if seeds else [])))
    return Table(
        title=title, columns=("method", *columns, *(["seeds"] if seeds else [])), rows=tuple(rows), caption=caption
    )


def _summary(column: str, scale: float = 1.0) -> Callable[[StoredRun], float | None]:
    def value(run: StoredRun) -> float | None:
        stored = run.summary.get(column)
        return None if stored in (None, "") else float(stored) * scale

    return value


def _aggregate(column: str) -> Callable[[StoredRun], float | None]:
    """AVG, Last or BWT; None where the method's protocol does not define it."""

    def value(run: StoredRun) -> float | None:
        stored = _summary(column)(run)
        trained = {cell for cell in run.not_measured if cell[0] > 0}
        return NotMeasured() if stored is None and trained else stored

    return value


def summary_table(runs: Sequence[StoredRun]) -> Table:
    """The main table: AVG, Last, BWT, what was trained and how long it took."""
    columns = {
        "AVG": _aggregate("AVG"),
        "Last": _aggregate("Last"),
        "BWT": _aggregate("BWT"),
        "trained per task": _summary("trainable_parameters"),
        "train s": _summary("train_seconds"),
        "routing accuracy %": _summary("routing_accuracy", 100.0),
    }
    return _by_group("Results", runs, columns, caption=CONVENTION, digits={"trained per task": 0, "train s": 0})


def last_table(runs: Sequence[StoredRun]) -> Table:
    """Score of every task in its final row: A[N][i] for a sequential method. One row per task."""

    def value(task: str) -> Callable[[StoredRun], float | None]:
        return lambda run: final_points(run).get(task)

    names = {task: value(task) for task in runs[0].tasks}
    title, reached = "Score per task after the last stage", ceilings(runs)
    caption = "points of each task's own metric; ceiling: what the taught answers score against the references"
    table = _turned(_by_group(title, runs, names, seeds=False), "task")
    rows = tuple((*row, reached[row[0]]) for row in table.rows)
    return Table(title=title, columns=(*table.columns, "ceiling"), rows=rows, caption=caption)


def ceilings(runs: Sequence[StoredRun]) -> dict[str, str]:
    """By task, `Metric.ceiling` of the test split; of runs on different splits all that there are."""
    found: dict[str, dict[str, None]] = {task: {} for run in runs for task in run.tasks}
    splits = {(run.folder / "references.jsonl.gz").read_bytes(): run for run in runs}
    for run in splits.values():
        for task, references in read_references(run.folder).items():
            if task in found:
                found[task][f"{scored_by(references).ceiling(references):.2f}"] = None
    return {task: " / ".join(points) or "-" for task, points in found.items()}


def well_formed_table(runs: Sequence[StoredRun]) -> Table:
    """Share of predictions with the form of an answer, in the row that `last_table` shows. One row per task.

    A score that fell together with this share was lost to the form of the answer, not to its content.
    """

    def value(task: str) -> Callable[[StoredRun], float | None]:
        return lambda run: final_well_formed(run).get(task)

    names = {task: value(task) for task in runs[0].tasks}
    title = "Well-formed answers after the last stage, %"
    return _turned(_by_group(title, runs, names, digits=dict.fromkeys(names, 1), seeds=False), "task")


def _turned(table: Table, corner: str) -> Table:
    """Rows for columns: methods stand side by side and many tasks stay readable on a terminal."""
    columns = (corner, *(row[0] for row in table.rows))
    rows = tuple((name, *(row[i] for row in table.rows)) for i, name in enumerate(table.columns) if i > 0)
    return Table(title=table.title, columns=columns, rows=rows, caption=table.caption)


def final_points(run: StoredRun) -> dict[str, float]:
    """Each task's score in its final row; `NotMeasured` where `evaluation` left that out."""
    return {
        task: NotMeasured() if (row, task) in run.not_measured else float(run.matrix[row, run.tasks.index(task)])
        for task, row in _final_rows(run).items()
    }


def final_well_formed(run: StoredRun) -> dict[str, float]:
    """Percent of well-formed answers per task, in the row of `final_points`."""
    return {
        task: share if isinstance(share, NotMeasured) else 100.0 * share
        for task, share in _of_final_rows(run, "well_formed").items()
    }


def _final_rows(run: StoredRun) -> dict[str, int]:
    """The row of each task's final score; in older results the last one where the task was measured."""
    if run.final_rows is not None:
        return dict(zip(run.tasks, run.final_rows, strict=True))
    measured = {task: ~np.isnan(run.matrix[:, i]) for i, task in enumerate(run.tasks)}
    return {task: int(rows.nonzero()[0][-1]) for task, rows in measured.items() if rows.any()}


def _of_final_rows(run: StoredRun, key: str) -> dict[str, float]:
    """result.json's `key` ({row: {task: number}}) in each task's final row."""
    stored = run.result.get(key) or {}
    found: dict[str, float] = {}
    for task, row in _final_rows(run).items():
        if (row, task) in run.not_measured:
            found[task] = NotMeasured()
        elif task in stored.get(str(row), {}):
            found[task] = float(stored[str(row)][task])
    return found


def cut_table(runs: Sequence[StoredRun]) -> Table:
    """Answers that stopped at `evaluation.max_new_tokens`, in the row that `last_table` shows. One row per task.

    A cut answer is scored as it is. No rows where no answer was cut, or where a run did not record it.
    """

    def value(task: str) -> Callable[[StoredRun], float | None]:
        return lambda run: _of_final_rows(run, "cut_at_max_new_tokens").get(task)

    title = "Answers cut at max_new_tokens after the last stage"
    names = {task: value(task) for task in runs[0].tasks}
    if not any(count > 0 for run in runs for count in _of_final_rows(run, "cut_at_max_new_tokens").values()):
        return Table(title=title, columns=("task",), rows=())
    return _turned(_by_group(title, runs, names, digits=dict.fromkeys(names, 1), seeds=False), "task")


def matrix_table(run: StoredRun) -> Table:
    """A[t][i] of one run."""
    rows = []
    for stage, row in enumerate(run.matrix):
        learned = "untrained" if stage == 0 else run.tasks[stage - 1]
        rows.append((f"{stage} {learned}", *(NOT_MEASURED if math.isnan(value) else f"{value:.1f}" for value in row)))
    return Table(
        title=f"{run.method}, seed {run.seed}, order {run.order}",
        columns=("after stage", *run.tasks),
        rows=tuple(rows),
        caption="rows: stage and the task learned in it; columns: points on each task",
    )


def conventions_table(runs: Sequence[StoredRun]) -> Table:
    """The same matrices by the other conventions; runs without a complete matrix are left out."""
    complete = [run for run in runs if other_conventions(run.matrix)]
    names = list(dict.fromkeys(name for run in complete for name in other_conventions(run.matrix)))

    def value(name: str) -> Callable[[StoredRun], float | None]:
        return lambda run: other_conventions(run.matrix).get(name)

    return _turned(
        _by_group("Other conventions", complete, {name: value(name) for name in names}, seeds=False), "number"
    )


def time_table(runs: Sequence[StoredRun]) -> Table:
    """Training and test time, and the method's own work as shares of their sum: the router works in both."""

    def tested(run: StoredRun) -> float | None:
        seconds = (run.result.get("profile") or {}).get("evaluation_seconds")
        return None if seconds is None else float(seconds)

    def share(column: str) -> Callable[[StoredRun], float | None]:
        def value(run: StoredRun) -> float | None:
            part, trained, test = _summary(column)(run), _summary("train_seconds")(run), tested(run)
            if part is None or trained is None or test is None or trained + test == 0:
                return None
            return 100.0 * part / (trained + test)

        return value

    def step(run: StoredRun) -> float | None:
        return (run.result.get("profile") or {}).get("step_ms")

    steps = {(run.folder.parent, run.method, run.seed, run.order): step(run) for run in runs}

    def ratio(baseline: str) -> Callable[[StoredRun], float | None]:
        def value(run: StoredRun) -> float | None:
            own, theirs = step(run), steps.get((run.folder.parent, baseline, run.seed, run.order))
            return own / theirs if own and theirs else None

        return value

    own = dict.fromkeys(name for run in runs for name in run.summary if name.endswith("_seconds"))
    work = {name: name.removesuffix("_seconds") for name in own if name != "train_seconds"}
    columns = {
        "train s": _summary("train_seconds"),
        "test s": tested,
        **{f"step / {baseline}'s": ratio(baseline) for baseline in _baselines(runs)},
        **{f"{name} s": _summary(column) for column, name in work.items()},
        **{f"{name} % of run": share(column) for column, name in work.items()},
    }
    return _by_group("Time", runs, columns, caption="run: train + test", digits={"train s": 0, "test s": 0})


def _baselines(runs: Sequence[StoredRun]) -> list[str]:
    """The methods by whose step times profile.csv divides."""
    files = dict.fromkeys(run.folder.parent.parent / "profile.csv" for run in runs)
    found = [ratio_columns(read_csv(file)[0]).values() for file in files if file.is_file()]
    return list(dict.fromkeys(name for names in found for name in names))


def several_experts(run: StoredRun) -> float | None:
    """Percent of the test samples that got two experts or more after the last stage, from the raw predictions."""
    if any(row == len(run.tasks) for row, _ in run.not_measured):
        return NotMeasured()
    last = [p.route for p in read_predictions(run.folder) if p.stage == len(run.tasks) and p.route is not None]
    return 100.0 * sum(len(route) > 1 for route in last) / len(last) if last else None


def routing_table(runs: Sequence[StoredRun]) -> Table:
    """How the routed methods served the test samples after the last stage."""
    routed = [run for run in runs if _summary("routing_accuracy")(run) is not None]
    columns = {
        "first choice is own task %": _summary("routing_accuracy", 100.0),
        "two experts %": several_experts,
        "base model %": _summary("base_model_share", 100.0),
    }
    return _by_group("Routing after the last stage", routed, columns, caption="shares of all test samples")


def rows_of(table: Table) -> list[dict[str, Any]]:
    """The rows as dictionaries by column, for tests and scripts."""
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]
