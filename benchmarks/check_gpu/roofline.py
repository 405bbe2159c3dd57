# SPDX-License-Identifier: Apache-2.0
"""
    roof(intensity) = min(peak, bandwidth * intensity)         achieved = needed flops / p50

The axes are the same for all providers: flops and bytes are those that the case needs (base product, active experts,
each operand once), not what a provider spends, so a baseline that moves more is lower, not further left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.benchmark import Outcome
from benchmarks.step_time_model import GPUS, Gpu


@dataclass(frozen=True, kw_only=True)
class Point:
    provider: str
    intensity: float  # flops a byte
    achieved: float  # flops a second


def points(outcome: Outcome) -> list[Point]:
    benchmark = outcome.benchmark
    found = []
    for provider in benchmark.providers:
        if provider.name in outcome.samples:
            moved = benchmark.base_bytes + (0.0 if provider.name == benchmark.base else benchmark.added_bytes)
            seconds = outcome.p50_ms(provider.name) / 1e3
            found.append(
                Point(
                    provider=provider.name,
                    intensity=provider.flops / moved,
                    achieved=provider.flops / seconds,
                )
            )
    return found


def published(device: str) -> tuple[str, Gpu] | None:
    """The published figures of a GPU whose name begins like the device's (an H100 PCIe gets those of an H100 SXM)."""
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
