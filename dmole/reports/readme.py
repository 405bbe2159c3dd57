# SPDX-License-Identifier: Apache-2.0
"""Tables inside Markdown files, made from committed results and never typed.

A file asks for a table between two markers, which stay:

    <!-- results: summary results/mini -->
    (made by `dmole readme`)
    <!-- /results -->

The words after `results:` are the table's name, the results folder relative to the file, and for `comparison` the two
methods. `csv` shows a CSV file, of which the further words name the columns. `dmole readme --check` compares without
writing; a test does the same.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dmole.files import write_atomically
from dmole.reports import markers
from dmole.reports.comparison import compare, comparison_table
from dmole.reports.stored import ResultsError, StoredRun, read_csv, read_runs
from dmole.reports.tables import (
    Table,
    conventions_table,
    last_table,
    routing_table,
    summary_table,
    time_table,
    well_formed_table,
)

TABLES: Mapping[str, Callable[[Sequence[StoredRun]], Table]] = {
    "summary": summary_table,
    "last": last_table,
    "well_formed": well_formed_table,
    "conventions": conventions_table,
    "time": time_table,
    "routing": routing_table,
}


def render(words: Sequence[str], folder: Path) -> str:
    """The Markdown that one marker asks for; `folder` is where the marked file lies."""
    usage = f"{' '.join(words)!r}; expected one of {', '.join(TABLES)}, comparison or csv, then a path"
    if len(words) == 4 and words[0] == "comparison":
        runs = read_runs(folder / words[1])
        return comparison_table(compare(runs, words[2], words[3])).markdown()
    if len(words) >= 2 and words[0] == "csv":
        return csv_table(folder / words[1], words[2:]).markdown()
    if len(words) != 2 or words[0] not in TABLES:
        raise ResultsError(f"marker has {usage} (comparison: and two methods).")
    return TABLES[words[0]](read_runs(folder / words[1])).markdown()


def csv_table(path: Path, columns: Sequence[str] = ()) -> Table:
    """A CSV file as it is, or these columns of it."""
    header, rows = read_csv(path)
    if absent := [column for column in columns if column not in header]:
        raise ResultsError(f"{path}: got no column {', '.join(absent)}; expected some of {', '.join(header)}.")
    shown = tuple(columns) or tuple(header)
    cells = tuple(tuple(row[header.index(column)] for column in shown) for row in rows)
    return Table(title=path.stem, columns=shown, rows=cells)


def filled(path: Path) -> str:
    """The text of a Markdown file with every marked table made anew. ResultsError names the file and the marker."""

    def make(words: Sequence[str]) -> str:
        try:
            return render(words, path.parent)
        except ResultsError as error:
            raise ResultsError(f"{path}: {error}") from error

    return markers.filled(path, "results", "...", make)


def stale(path: Path) -> bool:
    """Whether the tables of a Markdown file differ from what the results give."""
    return filled(path) != path.read_text(encoding="utf-8")


def update(path: Path) -> bool:
    """Write the tables anew; True if anything changed."""
    text = filled(path)
    if text == path.read_text(encoding="utf-8"):
        return False
    write_atomically(path, text.encode())
    return True
