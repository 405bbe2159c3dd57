# SPDX-License-Identifier: Apache-2.0
"""The table of the mini benchmark's admission rule, from the CSV that ``scripts/admission.py`` measured."""

import csv
from pathlib import Path

from dmole.reports.stored import ResultsError
from dmole.reports.tables import Table

COLUMNS = ("task", "metric", "finetune", "zero_shot", "text_only", "constant", "margin", "admitted")


def admission_table(path: Path) -> Table:
    """Four numbers a task on validation data, and the margin of Finetune over the best of the other three."""
    if not path.is_file():
        raise ResultsError(f"{path} does not exist; expected the CSV that scripts/admission.py writes.")
    with path.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    if not rows or not set(COLUMNS) <= set(rows[0]):
        raise ResultsError(f"{path} lacks columns of {', '.join(COLUMNS)}; expected the CSV of scripts/admission.py.")
    shown = tuple(column.replace("_", "-") for column in COLUMNS)
    return Table(
        title="Admission",
        columns=shown,
        rows=tuple(tuple(row[column] for column in COLUMNS) for row in rows),
        caption="Points on validation data; admitted at a margin of 10 points",
    )
