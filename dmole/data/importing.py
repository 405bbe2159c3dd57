# SPDX-License-Identifier: Apache-2.0
"""`dmole tasks import`: a published layout -> rows, `task.yaml`, `import.json`, and the stream's `stream.yaml`.

    target/stream.yaml           the tasks in their order; those of an earlier import stay
    target/<task>/task.yaml      name and metric
    target/<task>/train.jsonl    plain rows, and messages where a row has several turns; images by relative paths
    target/<task>/import.json    how many records each split had, and how many were left out for which reason

Images stay where they are. A record is left out when its layout cannot read it, when an image is missing or when it
would be a finding of `dmole tasks check`; every one is counted with its reason.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dmole.data.layouts import LAYOUTS, Dropped, Layout
from dmole.data.messages import RowPairs
from dmole.data.reading import SPLITS, STREAM_FILE, row_findings
from dmole.files import write_atomically
from dmole.metrics import METRICS

EXAMPLES = 5  # of each reason, in import.json


@dataclass
class SplitReport:
    """One split of an import: the rows written and, by reason, where records were left out."""

    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, where: str, why: str) -> None:
        """Count a record that was left out. Reasons that differ in names and numbers alone are one."""
        reason = re.sub(r"'[^']*'|\d+", "...", why)
        self.dropped[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < EXAMPLES:
            shown.append(f"{where}: {why}")


@dataclass(frozen=True)
class TaskReport:
    """What an import made of one task."""

    name: str
    metric: str
    splits: dict[str, SplitReport]

    def lines(self) -> list[str]:
        """The report as `dmole tasks import` prints it."""
        sizes = ", ".join(f"{report.rows:,} {split}" for split, report in self.splits.items())
        lines = [f"{self.name}: {self.metric}, {sizes}"]
        for split, report in self.splits.items():
            lines += [
                f"  {split}: left out {count:,}: {reason} (such as {report.examples[reason][0]})"
                for reason, count in report.dropped.most_common()
            ]
        return lines


def import_tasks(
    layout: str,
    source: Path,
    target: Path,
    *,
    images: Path | None = None,
    name: str | None = None,
    metric: str | None = None,
) -> list[TaskReport]:
    """Write the tasks of a layout below `target`.

    Args:
        images: the folder that the layout's image paths are relative to; the task's folder by default.
        name: what the task is called instead; for layouts of one task.
        metric: what the task is scored by instead; for layouts of one task.

    Raises:
        ValueError: an unknown layout or metric; a missing file; a task of which no training or test row is left; a
            task that `target` holds already.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}; expected one of {', '.join(LAYOUTS)}. Name one of these.")
    tasks = LAYOUTS[layout]
    if len(tasks) > 1 and (name or metric):
        raise ValueError(
            f"name and metric: got them for {layout}, which has {len(tasks)} tasks; expected none. Drop them."
        )
    if metric is not None and metric not in METRICS:
        raise ValueError(f"metric: got {metric!r}; expected one of {', '.join(METRICS)}. Name one of these.")
    if not source.is_dir():
        raise ValueError(f"source: got {source}, which is no folder; expected one with {_files(tasks)}. Check it.")
    planned = {name or task: (source / folder, one) for task, (folder, one) in tasks.items()}
    for task in planned:
        if (target / task).exists():
            raise ValueError(
                f"{target / task}: got a task that is there already; expected none. Delete it, or pass --name."
            )
    reports = []
    for task, (folder, one) in planned.items():
        report = _import_task(task, metric or one.metric, one, folder, target, images or folder)
        reports.append(report)
        _add_to_stream(target, report, one.taught)
    return reports


def _files(tasks: Mapping[str, tuple[str, Layout]]) -> str:
    return "; ".join(layout.files for _, layout in tasks.values())


def _import_task(task: str, metric: str, layout: Layout, source: Path, target: Path, images: Path) -> TaskReport:
    # Under a name of its own until it is whole: an import that fails leaves nothing behind.
    folder, partial = target / task, target / f".{task}.{secrets.token_hex(4)}.partial"
    partial.mkdir(parents=True)
    try:
        splits = {split: SplitReport() for split in SPLITS}
        for split, report in splits.items():
            rows = _sound_rows(layout.rows(source, split, images), images, metric, split, report)
            first = next(rows, None)
            if first is None:
                continue
            with (partial / f"{split}.jsonl").open("w", encoding="utf-8") as file:
                for row in (first, *rows):
                    row = _with_paths(row, images, folder)
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    report.rows += 1
        done = TaskReport(task, metric, splits)
        for split in ("train", "test"):
            if not splits[split].rows:
                raise ValueError(
                    f"{source}: got no {split} row for the task {task}; expected some in {layout.files}.\n"
                    + "\n".join(done.lines())
                )
        plain: dict[str, Any] = {"name": task, "metric": metric, "taught": layout.taught}
        write_atomically(partial / "task.yaml", yaml.safe_dump(plain, sort_keys=False).encode())
        kept = {
            split: {"rows": report.rows, "left_out": dict(report.dropped), "examples": report.examples}
            for split, report in splits.items()
        }
        write_atomically(partial / "import.json", (json.dumps({**plain, "splits": kept}, indent=2) + "\n").encode())
        os.replace(partial, folder)
    # What a layout's code raises for a record that lacks a field or has one of another kind.
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        _remove(partial)
        what = f"lacks {error}" if isinstance(error, KeyError) else f"is of another form ({error})"
        raise ValueError(
            f"{source}: got a record that {what}; expected those of {layout.files}. Check the layout's name."
        ) from error
    except FileNotFoundError as error:
        _remove(partial)
        raise ValueError(f"{source}: {error}; expected {layout.files}. Check the folder, or fetch the file.") from None
    except BaseException:
        _remove(partial)
        raise
    return done


def _remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def _sound_rows(
    rows: Iterator[Any], images: Path, metric: str, split: str, report: SplitReport
) -> Iterator[dict[str, Any]]:
    """The rows that are no findings. An id begins with the split, because published ids repeat between splits, and
    ends with a number where it repeats within one.
    """
    ids: Counter[str] = Counter()
    for row in rows:
        if isinstance(row, Dropped):
            report.drop(row.where, row.why)
            continue
        findings = row_findings(_pairs(row), images, metric, test=split != "train")
        missing = [] if findings else [image for image in row["images"] if not (images / image).is_file()]
        if missing:
            findings = [f"image {missing[0]!r} is missing"]
        if findings:
            report.drop(str(row["id"]), findings[0])
            continue
        ids[row["id"]] += 1
        again = f"-{ids[row['id']]}" if ids[row["id"]] > 1 else ""
        yield {**row, "id": f"{split}-{row['id']}{again}"}


def _pairs(value: Any) -> Any:
    if isinstance(value, dict):
        return RowPairs((key, _pairs(item)) for key, item in value.items())
    return [_pairs(item) for item in value] if isinstance(value, list) else value


def _with_paths(row: dict[str, Any], images: Path, folder: Path) -> dict[str, Any]:
    """The row with its images relative to the folder in which it is written."""
    shown = [Path(os.path.relpath(images / image, folder)).as_posix() for image in row["images"]]
    return {**row, "images": shown}


def _add_to_stream(target: Path, report: TaskReport, taught: str) -> None:
    path = target / STREAM_FILE
    stream: dict[str, Any] = {"name": target.resolve().name, "tasks": []}
    if path.exists():
        stream = yaml.safe_load(path.read_text(encoding="utf-8"))
    entry = {"name": report.name, "metric": report.metric, "directory": report.name}
    stream["tasks"] = [*stream["tasks"], {**entry, **({"taught": taught} if taught != "last" else {})}]
    write_atomically(path, yaml.safe_dump(stream, sort_keys=False).encode())
