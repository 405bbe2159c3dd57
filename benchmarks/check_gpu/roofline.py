# SPDX-License-Identifier: Apache-2.0
"""
    roof(intensity) = min(peak, bandwidth * intensity)         achieved = needed flops / p50

The same axes for everybody: flops and bytes are those that the case needs (base product, active experts, each operand
once), not what a provider spends, so a rival that moves more sits lower, not further left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.contest import Outcome
from benchmarks.step_time_model import GPUS, Gpu


@dataclass(frozen=True, kw_only=True)
class Point:
    provider: str
    intensity: float  # flops a byte
    achieved: float  # flops a second


def points(outcome: Outcome) -> list[Point]:
    contest = outcome.contest
    found = []
    for contender in contest.contenders:
        if contender.provider in outcome.samples:
            moved = contest.base_bytes + (0.0 if contender.provider == contest.base else contest.added_bytes)
            seconds = outcome.p50_ms(contender.provider) / 1e3
            found.append(
                Point(
                    provider=contender.provider,
                    intensity=contender.flops / moved,
                    achieved=contender.flops / seconds,
                )
            )
    return found


def published(device: str) -> tuple[str, Gpu] | None:
    """The vendor's figures where the device's name begins as one of theirs (an H100 PCIe is no H100 SXM: a guide)."""
    for name, gpu in GPUS.items():
        if name.split()[0] in device:
            return name, gpu
    return None


def draw(path: Path, found: Sequence[Point], *, peak: float, bandwidth: float, title: str) -> None:
    """Writes the picture: measured roof, the published one where there is one, and a mark for every result."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    least = min([0.5, *(point.intensity for point in found)])
    most = max([2 * peak / bandwidth, *(point.intensity for point in found)])
    line = np.geomspace(least / 2, most * 2, 200)
    axes.plot(line, np.minimum(peak, bandwidth * line), color="black", label="measured roof")
    known = published(title)
    if known is not None:
        name, gpu = known
        roof = np.minimum(gpu.flops, gpu.bandwidth * line)
        axes.plot(line, roof, color="grey", linestyle="--", label=f"published, {name}")
    for i, provider in enumerate(dict.fromkeys(point.provider for point in found)):
        own = [point for point in found if point.provider == provider]
        axes.scatter([p.intensity for p in own], [p.achieved for p in own], color=f"C{i}", label=provider, zorder=3)
    axes.set(xscale="log", yscale="log", xlabel="needed flops a byte", ylabel="achieved flops a second", title=title)
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
