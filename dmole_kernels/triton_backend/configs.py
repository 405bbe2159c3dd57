# SPDX-License-Identifier: Apache-2.0
"""
    configuration(kernel, target, bits) -> tile sizes, warps, stages

One dated table of launch configurations by target and shape class; nothing is tuned at run time. The class is the
element size and the column block (`column_block`), never the number of rows: a sample's result must not depend on the
batch size, and another tile could mean another order of summation.

2026-11-22: chosen so that every entry compiles without spills and fits the target's shared memory (aot.json). Entries
of tuned.json, measured on a GPU by `python -m dmole_kernels tune`, with date and device name, take precedence over
these; it is empty so far.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Bytes available to one block; gfx942 has 64 KiB of LDS.
SHARED_MEMORY = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}
TARGETS = tuple(SHARED_MEMORY)
SMALLEST_DOT = 16  # GPUs reject a dot with a side under 16; the interpreter accepts it
DROPOUT_GROUP = 128  # columns that share the counters of one Philox call: tiles of x and dx are multiples of it


@dataclass(frozen=True, kw_only=True)
class Config:
    """`rows` by `width` is the tile of tokens by features; for norms and router see the comments in the table.
    `depth`: features of x per step of `fused_base`; the others do not use it."""

    rows: int
    width: int
    warps: int
    stages: int
    depth: int = 0


Line = Mapping[str, tuple[Config, Config]]  # kernel -> (16-bit elements, 32-bit elements)
Target = str | Line  # the name of a target, or the line itself in trials of the tuner


# Dots of 32-bit elements are unrolled full-precision multiply-adds, which spill with larger tiles.
_LARGE = {
    "shrink": (Config(rows=32, width=128, warps=8, stages=3), Config(rows=16, width=128, warps=4, stages=2)),
    "expand": (Config(rows=64, width=128, warps=8, stages=2), Config(rows=32, width=32, warps=4, stages=2)),
    "shrink_gradient": (Config(rows=32, width=128, warps=4, stages=3), Config(rows=16, width=64, warps=4, stages=2)),
    "weight_gradient": (Config(rows=32, width=128, warps=4, stages=3), Config(rows=16, width=128, warps=8, stages=2)),
    "input_gradient": (Config(rows=64, width=128, warps=8, stages=2), Config(rows=16, width=128, warps=8, stages=2)),
    "fused_base": (
        Config(rows=64, width=128, depth=64, warps=8, stages=3),
        Config(rows=32, width=64, depth=16, warps=8, stages=2),
    ),
    # Norms: width x width tiles of the gradient, rows tokens at a time; ghost: rows x rows Gram tiles.
    "norm_direct": (Config(rows=32, width=64, warps=4, stages=2),) * 2,
    "norm_ghost": (Config(rows=32, width=32, warps=4, stages=2),) * 2,
    "sketch": (Config(rows=32, width=32, warps=4, stages=2),) * 2,
    # Router: rows samples, width features at a time.
    "router_score": (Config(rows=16, width=64, warps=4, stages=2), Config(rows=16, width=32, warps=4, stages=2)),
}
# Accumulators are in separate memory there, which leaves registers for a larger tile.
_SM_100 = _LARGE | {
    "fused_base": (
        Config(rows=128, width=128, depth=64, warps=8, stages=3),
        Config(rows=32, width=64, depth=16, warps=8, stages=2),
    ),
}
_SM_120 = _LARGE | {
    "shrink_gradient": (Config(rows=32, width=128, warps=4, stages=2), Config(rows=16, width=64, warps=4, stages=2)),
    "input_gradient": (Config(rows=32, width=128, warps=8, stages=2), Config(rows=16, width=128, warps=8, stages=2)),
}
# Loads in flight occupy registers there: too many for 64 columns of float32 experts.
_GFX942 = _LARGE | {
    "shrink": (Config(rows=32, width=128, warps=8, stages=1), Config(rows=16, width=128, warps=8, stages=1)),
    "shrink_gradient": (Config(rows=32, width=64, warps=4, stages=2), Config(rows=16, width=64, warps=4, stages=1)),
    "weight_gradient": (Config(rows=32, width=128, warps=4, stages=2), Config(rows=16, width=128, warps=8, stages=1)),
    "fused_base": (
        Config(rows=64, width=128, depth=64, warps=4, stages=2),
        Config(rows=32, width=64, depth=16, warps=8, stages=2),
    ),
}
# Small tiles, so that small tests cross tile borders; every path of the GPUs' tables is tested.
_INTERPRETER = {
    "shrink": (Config(rows=32, width=128, warps=1, stages=1),) * 2,
    "expand": (Config(rows=64, width=32, warps=1, stages=1),) * 2,
    "shrink_gradient": (Config(rows=16, width=32, warps=1, stages=1),) * 2,
    "weight_gradient": (Config(rows=32, width=128, warps=1, stages=1),) * 2,
    "input_gradient": (Config(rows=32, width=128, warps=1, stages=1),) * 2,
    "fused_base": (Config(rows=32, width=32, depth=16, warps=1, stages=1),) * 2,
    "norm_direct": (Config(rows=16, width=16, warps=1, stages=1),) * 2,
    "norm_ghost": (Config(rows=16, width=16, warps=1, stages=1),) * 2,
    "sketch": (Config(rows=16, width=16, warps=1, stages=1),) * 2,
    "router_score": (Config(rows=16, width=16, warps=1, stages=1),) * 2,
}
_WRITTEN: dict[str, Line] = {
    "sm_80": _LARGE,
    "sm_90": _LARGE,
    "sm_100": _SM_100,
    "sm_120": _SM_120,
    "gfx942": _GFX942,
    "interpreter": _INTERPRETER,
}
TUNED = Path(__file__).with_name("tuned.json")

# The kernel whose flags each kernel reads; its tile is a multiple of their row groups.
FLAGS_OF = {
    "expand": "shrink",
    "fused_base": "shrink",
    "weight_gradient": "shrink_gradient",
    "input_gradient": "shrink_gradient",
}
MASKED_TILES = ("shrink", "weight_gradient", "input_gradient")


def misfits(line: Line) -> Iterator[str]:
    """Readable lines: entries that the kernels cannot use."""
    for kernel, pair in line.items():
        for config, bits, element in zip(pair, ("16", "32"), (0, 1), strict=True):
            leader = line[FLAGS_OF[kernel]][element] if kernel in FLAGS_OF else config
            if config.rows % leader.rows:
                yield f"{kernel}, {bits} bits: {config.rows} rows; expected a multiple of the flags' {leader.rows}"
            if kernel in MASKED_TILES and config.width != DROPOUT_GROUP:
                yield f"{kernel}, {bits} bits: width {config.width}; expected {DROPOUT_GROUP}, a group of the mask"


def with_tuned(table: Mapping[str, Line], record: Mapping[str, Any]) -> dict[str, Line]:
    """The table with the entries of a tuner's record (tuned.json) in place of its own.

    Raises:
        ValueError: for a target that is no GPU of the table, or tiles that the kernels cannot use.
    """
    merged = dict(table)
    for target, entry in record.items():
        if target not in TARGETS:
            raise ValueError(
                f"{TUNED.name} has an entry for {target!r}; expected {', '.join(TARGETS)}. Run the tuner on such a GPU."
            )
        measured = {
            kernel: tuple(Config(**by_bits[bits]) if bits in by_bits else old
                          for bits, old in zip(("16", "32"), table[target][kernel], strict=True))
            for kernel, by_bits in entry["kernels"].items()
        }  # fmt: skip
        merged[target] = {**table[target], **measured}  # type: ignore[dict-item]
        wrong = list(misfits(merged[target]))
        if wrong:
            raise ValueError(f"{TUNED.name} for {target}: {'; '.join(wrong)}. Run the tuner again.")
    return merged


TABLE = with_tuned(_WRITTEN, json.loads(TUNED.read_text(encoding="utf-8")))


def configuration(kernel: str, target: Target, bits: int) -> Config:
    """The table's entry. Raises ValueError for a target without one."""
    if isinstance(target, str):
        if target not in TABLE:
            raise ValueError(
                f"target is {target!r}; expected one of {', '.join(TABLE)}. Add a line to triton_backend/configs.py or "
                f"pass backend='reference'."
            )
        target = TABLE[target]
    return target[kernel][0 if bits <= 16 else 1]


def column_block(columns: int) -> int:
    """16, 32 or 64 packed columns a program: the shape class of the ranks."""
    return 16 if columns <= 16 else 32 if columns <= 32 else 64


def target_of_capability(major: int, minor: int) -> str:
    """The nearest entry that fits: 8.6 and 8.9 have the small shared memory of 12.0."""
    if (major, minor) in ((8, 0), (8, 7)):
        return "sm_80"
    if major == 9:
        return "sm_90"
    if major in (10, 11):
        return "sm_100"
    if major in (8, 12):
        return "sm_120"
    raise ValueError(
        f"the GPU has compute capability {major}.{minor}; expected 8.0 or newer. Pass backend='reference' on this one."
    )
