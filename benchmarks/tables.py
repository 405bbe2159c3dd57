# SPDX-License-Identifier: Apache-2.0
"""
    python -m benchmarks.tables README.md [--check]

Fills the tables of a Markdown file from committed CSVs; no number is typed by hand. Two markers enclose a table:

    <!-- benchmarks: benchmarks/results/multi_lora.csv case=main threads=1 -->
    (made here)
    <!-- /benchmarks -->

A .json path is a summary: one line per ratio, with its target. Filters after the path of a CSV (relative to the
Markdown file) keep the rows whose column matches the pattern (or one of several, separated by bars); the table has one
line per case and one column per provider, p50 in milliseconds. Machine, versions and commit are below it. `--check`
writes nothing and exits with 1 if a table differs from its CSV.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from benchmarks.records import COLUMNS, read_rows

MARKER = re.compile(r"^<!-- (?:benchmarks:.*|/benchmarks) -->$", re.MULTILINE)
BLOCK = re.compile(
    r"^(?P<begin><!-- benchmarks: (?P<words>[^\n]*?) -->)\n.*?^(?P<end><!-- /benchmarks -->)$", re.MULTILINE | re.DOTALL
)
LINE = ("case", "dtype", "direction", "threads")


def filled(path: Path) -> str:
    """The file's text with every marked table made anew."""

    def make(words: Sequence[str]) -> str:
        file, *filters = words
        source = path.parent / file
        return summary_table(source) if source.suffix == ".json" else table(source, filters)

    text = path.read_text(encoding="utf-8")
    found = BLOCK.findall(text)
    if 2 * len(found) != len(MARKER.findall(text)):
        raise ValueError(
            f"{path}: a marker has no partner; expected '<!-- benchmarks: FILE -->', then '<!-- /benchmarks -->'."
        )
    return BLOCK.sub(lambda block: f"{block['begin']}\n\n{make(block['words'].split())}\n{block['end']}", text)


# The target of each ratio of the summary, on a CPU with AMX: (row, ratio) -> (bound, whether it is a lower bound).
TARGETS = {
    ("bf16_top2", "ours_over_base"): (1.25, False),
    ("bf16_top2", "packed_eager_over_ours"): (1.4, True),
    ("bf16_top2", "peft_loop_over_ours"): (3.5, True),
    ("bf16_top2", "dmole_loop_over_ours"): (8.0, True),
    ("fp32_top2", "ours_over_base"): (1.12, False),
    ("fp32_top2", "packed_eager_over_ours"): (1.0, True),
    ("fp32_top2", "grouped_mm_over_ours"): (1.0, True),
    ("decode_bf16", "packed_eager_over_ours"): (2.0, True),
    ("experts_4_to_256", "time_many_over_few"): (1.15, False),
    ("saved_for_backward", "saved_over_allowed_bf16"): (1.0, False),
    ("saved_for_backward", "saved_over_allowed_fp32"): (1.0, False),
    ("grad_norm", "auto_over_fastest"): (1.1, False),
    ("grad_norm", "opacus_over_auto_up_to_256_tokens"): (2.0, True),
    ("proxy", "exact_time_over_plain_backward"): (0.75, False),
    ("proxy", "exact_extra_memory_over_plain_backward"): (0.1, False),
    ("proxy", "exact_frozen_linears_time_over_plain_backward"): (0.75, False),
    ("router_score", "autoencoder_loop_over_ours"): (5.0, True),
}


def summary_table(file: Path) -> str:
    """Markdown of a summary: every ratio, its target where it has one, and whether that was reached."""
    summary = json.loads(file.read_text(encoding="utf-8"))
    made = ["| row | ratio | measured | target | reached |", "|---|---|---:|---:|---|"]
    for row, ratios in summary.items():
        if row in ("about", "wrong"):
            continue
        for name, value in ratios.items():
            bound, least = TARGETS.get((row, name), (None, True))
            target = "" if bound is None else f"{'>=' if least else '<='} {bound:g}"
            met = ""
            if bound is not None and value is not None:
                met = "yes" if (value >= bound if least else value <= bound) else "no"
            made.append(f"| {row} | {name} | {'' if value is None else f'{value:.3g}'} | {target} | {met} |")
    about = summary["about"]
    return "\n".join(made) + f"\n\n{about['machine']}; {about['versions']}; commit {about['commit']}.\n"


def table(file: Path, filters: Sequence[str]) -> str:
    """Markdown of the rows of a CSV that pass filters such as "case=main"."""
    rows = read_rows(file)
    for entry in filters:
        column, sign, pattern = entry.partition("=")
        if not sign or column not in COLUMNS:
            raise ValueError(f"filter {entry!r}; expected column=pattern with a column of {', '.join(COLUMNS)}.")
        rows = [row for row in rows if any(fnmatch(row[column], choice) for choice in pattern.split("|"))]
    if not rows:
        raise ValueError(f"{file} has no row for {' '.join(filters)!r}; expected some. Loosen the filters.")
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        lines.setdefault(tuple(row[name] for name in LINE), {})[row["provider"]] = row["p50_ms"]
    head = [*LINE, *(f"{provider}, ms" for provider in providers)]
    made = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for key, times in lines.items():
        made.append(f"| {' | '.join([*key, *(_short(times.get(provider)) for provider in providers)])} |")
    sources = dict.fromkeys(f"{row['machine']}; {row['versions']}; commit {row['commit']}" for row in rows)
    return "\n".join(made) + "\n\np50. " + " / ".join(sources) + ".\n"


def _short(text: str | None) -> str:
    """Three significant digits without an exponent; a provider without a row has an empty cell."""
    if text is None:
        return ""
    value = float(text)
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if a table is stale")
    options = parser.parse_args(arguments)
    stale = [path for path in options.files if filled(path) != path.read_text(encoding="utf-8")]
    for path in stale:
        print(f"{path}: {'stale' if options.check else 'written'}")
        if not options.check:
            path.write_text(filled(path), encoding="utf-8")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
