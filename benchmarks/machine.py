# SPDX-License-Identifier: Apache-2.0
"""Measured peak and bandwidth of this machine, and the name, versions and commit of every row."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from benchmarks.records import Row
from dmole.runs.environment import describe_environment
from dmole_kernels import BACKENDS, cpu
from dmole_kernels.testing import dtype_name
from dmole_kernels.testing import threads as with_threads

# (rows, in, out): the larger one is fastest in most libraries, the smaller one saves time on slow machines.
PEAK_SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048))
COPY_BYTES = 2**28  # far beyond every cache


@dataclass
class Machine:
    """Peak and bandwidth are measured once per dtype and number of threads, when first needed; on a GPU the number of
    threads has no effect."""

    name: str
    versions: str
    commit: str
    shapes: tuple[tuple[int, int, int], ...] = PEAK_SHAPES
    copy_bytes: int = COPY_BYTES
    device: str = "cpu"
    _peak: dict[tuple[torch.dtype, int], float] = field(default_factory=dict)
    _bandwidth: dict[int, float] = field(default_factory=dict)

    def peak(self, dtype: torch.dtype, threads: int) -> float:
        """FLOP/s of the fastest product, by `F.linear` or by this package's kernel."""
        key = (dtype, threads)
        if key not in self._peak:
            with with_threads(threads), torch.no_grad():
                self._peak[key] = max(_linear_rate(dtype, *shape, self.device) for shape in self.shapes)
        return self._peak[key]

    def bandwidth(self, threads: int) -> float:
        """Byte/s read and written by the fastest `copy_` between buffers larger than every cache."""
        if threads not in self._bandwidth:
            source = torch.zeros(self.copy_bytes // 4, device=self.device)
            target = torch.empty_like(source)
            with with_threads(threads):
                best = _fastest(lambda: target.copy_(source), 5, self.device)
            self._bandwidth[threads] = 2 * self.copy_bytes / best
        return self._bandwidth[threads]

    def row(
        self, *, case: str, dtype: str, direction: str, threads: int, provider: str,
        times_ms: tuple[float, float, float], peak_memory_mib: float | str = "", peak_fraction: float | str = "",
        overhead_over_floor: float | str = "",
    ) -> Row:  # fmt: skip
        return Row(
            case=case,
            dtype=dtype,
            direction=direction,
            threads=threads,
            provider=provider,
            p20_ms=times_ms[0],
            p50_ms=times_ms[1],
            p80_ms=times_ms[2],
            peak_memory_mib=peak_memory_mib,
            peak_fraction=peak_fraction,
            overhead_over_floor=overhead_over_floor,
            machine=self.name,
            versions=self.versions,
            commit=self.commit,
        )

    def measured_rows(self) -> list[Row]:
        """The measured peaks and bandwidths that peak fractions and floors were computed with, as rows."""
        rows = []
        for (dtype, threads), rate in self._peak.items():
            n, d, p = self.shapes[-1]
            milliseconds = 2e3 * n * d * p / rate
            rows.append(
                self.row(
                    case=f"machine_peak_{n}x{d}x{p}",
                    dtype=dtype_name(dtype),
                    direction="forward",
                    threads=threads,
                    provider="fastest_linear",
                    times_ms=(milliseconds, milliseconds, milliseconds),
                    peak_fraction=1.0,
                )
            )
        for threads, rate in self._bandwidth.items():
            milliseconds = 2e3 * self.copy_bytes / rate
            rows.append(
                self.row(
                    case=f"machine_bandwidth_{self.copy_bytes >> 20}_MiB",
                    dtype="float32",
                    direction="forward",
                    threads=threads,
                    provider="copy_",
                    times_ms=(milliseconds, milliseconds, milliseconds),
                )
            )
        return rows

    def describe(self) -> list[str]:
        """Readable lines of the measurements so far."""
        rates = [f"peak {dtype_name(d)}, {t} thread(s): {rate / 1e9:.0f} GF/s" for (d, t), rate in self._peak.items()]
        return rates + [f"bandwidth, {t} thread(s): {rate / 1e9:.1f} GB/s" for t, rate in self._bandwidth.items()]


def this_machine() -> Machine:
    """Its name ends with the widest instruction set in use: of the compiled kernels, else of PyTorch's."""
    environment = describe_environment()
    commit = environment["commit"] or "unknown"
    parts = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    try:
        parts.append(f"peft {importlib.metadata.version('peft')}")
    except importlib.metadata.PackageNotFoundError:
        parts.append("no peft")
    isa = str(environment["cpu_capability"]).lower()
    if "cpu" in BACKENDS:
        extension = importlib.import_module("dmole_kernels._C")
        isa = extension.isa()
        parts.append(f"compiler {extension.build_info()['compiler']}")
    parts.append(f"backends {'+'.join(BACKENDS)}")
    return Machine(
        name=f"{environment['cpu']}, {environment['cores']} cores, {isa}",
        versions="; ".join(parts),
        commit=commit[:12] + ("+" if commit.endswith("+") else ""),
    )


def _linear_rate(dtype: torch.dtype, rows: int, inputs: int, outputs: int, device: str) -> float:
    x, weight = (torch.randn(side, inputs, device=device).to(dtype) for side in (rows, outputs))
    seconds = _fastest(lambda: F.linear(x, weight), 8, device)
    if cpu.EXTENSION is not None and device == "cpu" and dtype in cpu.DTYPES:
        own = _fastest(lambda: torch.ops.dmole_kernels.cpu_frozen_linear(x, weight, None), 8, device)
        seconds = min(seconds, own)
    return 2.0 * rows * inputs * outputs / seconds


def _fastest(run: Callable[[], object], calls: int, device: str) -> float:
    wait: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    run()
    for _ in range(calls):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)
