# SPDX-License-Identifier: Apache-2.0
"""What this process may use of the machine: processor, cores, memory. The standard library alone."""

from __future__ import annotations

import functools
import os
import platform
import resource
import sys
from collections.abc import Mapping
from pathlib import Path


def usable_cores() -> int:
    """How many cores this process may use."""
    # Python 3.13 has os.process_cpu_count(); where there is no affinity (macOS) the count of cores is it.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gib() -> float | None:
    """Physical memory, or the control group's limit if that is lower; None where neither can be read."""
    limits = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    group = Path("/sys/fs/cgroup/memory.max")
    if group.is_file() and (text := group.read_text().strip()).isdecimal():
        limits.append(int(text))
    return min(limits) / 2**30 if limits else None


def peak_memory_gib() -> float:
    """The largest resident size this process has had, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


@functools.cache
def processor() -> Mapping[str, str]:
    """The fields that /proc/cpuinfo has of the first core; {} where there is no such file."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return {}
    lines = info.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def processor_name() -> str:
    """Such as "AMD EPYC 9654"; "unknown" where the system does not say."""
    return processor().get("model name") or platform.processor() or "unknown"
