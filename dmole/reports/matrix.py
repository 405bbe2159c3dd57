# SPDX-License-Identifier: Apache-2.0
"""The matrix A[t][i] as a picture: rows are stages, columns tasks, colour is the share of the column's best score.

Columns have different units (CIDEr x 100 can exceed 100), so each is coloured against its own maximum; the numbers are
the points. The diagonal, where a task was just learned, is framed. Grey cells were not measured.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dmole.files import write_atomically
from dmole.reports.continual import Array, check_matrix

MOST = 40  # tasks: with more a picture of this style would have gigabytes of pixels


def save_matrix_picture(path: Path, matrix: Array, tasks: Sequence[str], *, title: str = "") -> None:
    """Write `matrix` ([N + 1, N], NaN = not measured) as a PNG. Uses no display and no global matplotlib state."""
    array = check_matrix(matrix)
    n = array.shape[1]
    if len(tasks) != n:
        raise ValueError(f"tasks has {len(tasks)} names; expected {n}, one per column of the matrix. Name each column.")
    measured = np.where(np.isnan(array), -np.inf, array).max(axis=0)
    best = np.where(measured > 0, measured, 1.0)
    shown = min(n, MOST)  # beyond it the picture keeps its size, and has colours without numbers
    figure = Figure(figsize=(2.2 + 0.85 * shown, 1.9 + 0.42 * (shown + 1)), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = np.ma.masked_invalid(array / best)
    axes.imshow(shares, cmap="YlGnBu", vmin=0.0, vmax=1.0, aspect="auto")
    for t, i in np.ndindex(array.shape if n <= MOST else (0, 0)):
        if not np.isnan(array[t, i]):
            colour = "white" if array[t, i] / best[i] > 0.6 else "black"
            axes.text(i, t, f"{array[t, i]:.1f}", ha="center", va="center", fontsize=8, color=colour)
    if np.isnan(array).any():
        axes.set_facecolor("0.85")
    for i in range(n):
        axes.add_patch(Rectangle((i - 0.5, i + 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.2))
    every = -(-n // MOST)
    rows = ["untrained", *(f"{t}: {task}" for t, task in enumerate(tasks, start=1))]
    axes.set_xticks(range(0, n, every), [task.replace("_", "\n") for task in tasks[::every]], fontsize=8)
    axes.set_yticks(range(0, n + 1, every), rows[::every], fontsize=8)
    axes.set_ylabel("after stage")
    grey = "; grey: not measured" if np.isnan(array).any() else ""
    axes.set_xlabel(f"tested on (points; colour: share of the column's best{grey})", fontsize=8)
    if title:
        axes.set_title(title, fontsize=10)
    picture = io.BytesIO()
    # The stamp would make equal matrices give different files.
    canvas.print_figure(picture, format="png", metadata={"Software": None})
    write_atomically(path, picture.getvalue())
