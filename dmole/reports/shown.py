# SPDX-License-Identifier: Apache-2.0
"""Which tables of a results folder are shown after a run, and by `dmole report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dmole.files import write_atomically
from dmole.reports import tables
from dmole.reports.comparison import compare as compared
from dmole.reports.comparison import comparison_table
from dmole.reports.stored import StoredRun


def show(
    console: Console,
    runs: Sequence[StoredRun],
    *,
    everything: bool = False,
    compare: Sequence[str] | None = None,
    markdown: Path | None = None,
    matrices: bool = False,
) -> None:
    """Print the tables of `runs`.

    Args:
        everything: with the conventions of other papers.
        compare: two methods, whose paired differences are shown.
        markdown: a file that gets the same tables.
        matrices: with the matrix of every run; those that are measured in part are shown anyway.
    """
    if len({run.tasks for run in runs}) > 1:
        shown = [tables.summary_table(runs)]
    else:
        cut = tables.cut_table(runs)
        shown = [tables.last_table(runs), tables.well_formed_table(runs), *([cut] if cut.rows else [])]
        shown.append(tables.summary_table(runs))
    routing = tables.routing_table(runs)
    shown += [routing] if routing.rows else []
    shown.append(tables.time_table(runs))
    if everything:
        conventions = tables.conventions_table(runs)
        shown += [conventions] if conventions.rows else []
    if compare is not None:
        shown.append(comparison_table(compared(runs, *compare)))
    # A matrix that is measured in part has its numbers there and nowhere else: the diagonal is in no aggregate.
    shown += [tables.matrix_table(run) for run in runs if matrices or run.not_measured]
    for table in shown:
        console.print(table.rich())
    if markdown is not None:
        text = "\n".join(f"## {table.title}\n\n{table.markdown()}" for table in shown)
        write_atomically(markdown, text.encode())
