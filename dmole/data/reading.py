# SPDX-License-Identifier: Apache-2.0
"""Reading a stream from a folder, and finding everything that is wrong with it before any training starts.

The schema is in `README.md` beside this file. Nothing is repaired and nothing is skipped: a line is either a sample or
a problem with its file and line, and one problem anywhere means no stream. All problems are collected first, so that a
file with forty bad lines is mended once. JSON lines, Parquet and folders of `datasets` (`dmole.data.tables`) all become
rows that pass the same `_check_row`.

With `rows="disk"` a sample is written to the disk when its row has passed, and what has to be remembered of all rows,
such as their ids, is there too: memory does not grow with the rows.

Cost: images are decoded once each (a truncated JPEG opens well and fails only when decoded), in a few threads; about
0.3 ms for a picture of 160 pixels.
"""

import codecs
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from PIL import Image

from dmole.config_error import did_you_mean
from dmole.data.images import ImageReport, inspect_image
from dmole.data.leaks import LeakFinder
from dmole.data.messages import RowPairs as _Pairs
from dmole.data.messages import kind as _kind
from dmole.data.messages import plain_fields, row_keys
from dmole.data.sample import Sample, Stream, Task, Turn
from dmole.data.seen import Seen
from dmole.data.stored import SampleWriter
from dmole.data.tables import Table, table_rows, tables_of
from dmole.data.text_checks import parse_json, path_complaint, text_complaint, text_complaints
from dmole.metrics import METRICS
from dmole.strict_yaml import compose_yaml

STREAM_FILE = "stream.yaml"
SPLITS = ("train", "validation", "test")
SHOWN_PROBLEMS = 20
MINIMUM_TRAIN = 2

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_STREAM_KEYS = ("name", "tasks")
_TASK_KEYS = ("name", "metric", "directory")
TAUGHT = ("last", "all")
_SAMPLE_KEYS = ("id", "image", "images", "instruction", "answers", "options", "entities")
_REQUIRED_KEYS = ("id", "instruction", "answers")
# Rows whose pictures are checked together.
CHECKED_TOGETHER = 4096


class DataError(ValueError):
    """A data set cannot be used. `problems` holds all findings, "file:line: what is wrong"; the text shows 20."""

    def __init__(self, folder: Path, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        self.folder = folder
        super().__init__(self.text(SHOWN_PROBLEMS))

    def text(self, most: int | None = None) -> str:
        """The count and the first `most` findings, or all."""
        shown = list(self.problems[:most])
        if len(shown) < len(self.problems):
            shown.append(f"... and {len(self.problems) - len(shown)} more (dmole tasks check --all shows them)")
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        return "\n".join([f"{count} in the data set {self.folder}:", *shown])


@dataclass
class _Problems:
    """Where findings gather; paths are shown relative to the stream's folder."""

    folder: Path
    found: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, path: Path, line: int | None, text: str) -> None:
        self.found.append(f"{self.place(path, line)}: {text}")

    def note(self, path: Path, line: int | None, text: str) -> None:
        """Something that is used in another way than expected; it refuses nothing."""
        self.notes.append(f"{self.place(path, line)}: {text}")

    def place(self, path: Path, line: int | None) -> str:
        shown = path.relative_to(self.folder) if path.is_relative_to(self.folder) else path
        return f"{shown.as_posix()}{'' if line is None else f':{line}'}"


@dataclass(frozen=True)
class _Row:
    """A parsed line that still remembers where it stood."""

    file: Path
    line: int
    sample: Sample


def read_stream(
    folder: Path | str,
    *,
    check_images: bool = True,
    rows: Literal["memory", "disk"] = "memory",
    leaks: LeakFinder | None = None,
) -> Stream:
    """Read the stream in `folder` (its `stream.yaml` and one directory per task).

    Args:
        check_images: decode every image. Without it, images need only exist.
        rows: where the samples stay, see `dmole.data.stored`. The samples, their order and all findings are the same.
        leaks: is shown every row with its place.

    Raises DataError (a ValueError) that lists every problem, each with its file and line.
    """
    folder = Path(folder).resolve()
    problems = _Problems(folder)
    stream_file = folder / STREAM_FILE
    if not stream_file.is_file():
        problems.add(stream_file, None, f"file is missing; a data set is a folder with a {STREAM_FILE} in it")
        raise DataError(folder, problems.found)
    name, entries = _read_stream_file(stream_file, problems)
    # Sizes of all pictures would grow with the rows.
    sizes: dict[Path, tuple[int, int]] | None = {} if rows == "memory" else None
    with Seen() as seen:
        tasks = [
            _read_task(folder, entry, problems, seen, sizes, leaks, decode=check_images, rows=rows) for entry in entries
        ]
    if problems.found:
        raise DataError(folder, problems.found)
    return Stream(name=name, tasks=tuple(tasks), notes=tuple(problems.notes), image_sizes=sizes or {})


@dataclass(frozen=True)
class _TaskEntry:
    name: str
    metric: str
    directory: str
    line: int
    taught: Literal["last", "all"] = "last"


def _read_stream_file(path: Path, problems: _Problems) -> tuple[str, list[_TaskEntry]]:
    """The name and the task entries. Entries with a problem are left out; the problem makes the whole reading fail."""
    try:
        root = compose_yaml(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        problems.add(path, None, f"is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8")
        return "", []
    except yaml.MarkedYAMLError as error:
        line = None if error.problem_mark is None else error.problem_mark.line + 1
        problems.add(path, line, f"is not YAML: {error.problem}")
        return "", []
    except yaml.YAMLError as error:
        problems.add(path, None, f"is not YAML: {' '.join(str(error).split())}")
        return "", []
    if not isinstance(root, yaml.MappingNode):
        problems.add(path, 1, "expected the keys name and tasks at the top")
        return "", []
    top = _yaml_keys(path, root, _STREAM_KEYS, problems)
    name = _yaml_text(path, top, "name", root, problems)
    listed = top.get("tasks")
    if not isinstance(listed, yaml.SequenceNode) or not listed.value:
        line = root.start_mark.line if listed is None else listed.start_mark.line
        problems.add(
            path, line + 1, "tasks is missing or empty; expected a list like - {name: a, metric: cider, directory: a}"
        )
        return name, []
    entries: list[_TaskEntry] = []
    seen: dict[str, int] = {}
    for node in listed.value:
        line = node.start_mark.line + 1
        if not isinstance(node, yaml.MappingNode):
            problems.add(path, line, "expected a task like {name: a, metric: cider, directory: a}")
            continue
        keys = _yaml_keys(path, node, (*_TASK_KEYS, "taught"), problems)
        values = {key: _yaml_text(path, keys, key, node, problems) for key in _TASK_KEYS}
        if values["metric"] and values["metric"] not in METRICS:
            given, expected = values["metric"], ", ".join(METRICS)
            metric_line = keys["metric"].start_mark.line + 1
            problems.add(
                path, metric_line, f"metric is {given!r}; expected one of {expected}{_nearest(given, METRICS)}"
            )
            values["metric"] = ""
        if values["name"] and not _NAME.fullmatch(values["name"]):
            problems.add(
                path,
                keys["name"].start_mark.line + 1,
                f"name is {values['name']!r}; expected letters, digits, '_', '-', '.' (it names files and columns)",
            )
        if values["name"] in ("stage", "zero_shot"):
            problems.add(path, line, f"name is {values['name']!r}, a word of the result tables; choose another")
        taught = _yaml_text(path, keys, "taught", node, problems) if "taught" in keys else "last"
        if taught and taught not in TAUGHT:
            problems.add(
                path,
                keys["taught"].start_mark.line + 1,
                f"taught is {taught!r}; expected last (the last answer of a conversation is trained) or all",
            )
        if values["name"] and values["name"] in seen:
            problems.add(path, line, f"task {values['name']!r} is already defined on line {seen[values['name']]}")
            continue
        seen[values["name"]] = line
        if all(values.values()):
            entries.append(_TaskEntry(**values, line=line, taught="all" if taught == "all" else "last"))
    return name, entries


def _yaml_keys(path: Path, node: yaml.MappingNode, known: Sequence[str], problems: _Problems) -> dict[str, yaml.Node]:
    keys: dict[str, yaml.Node] = {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key not in known:
            problems.add(path, line, f"unknown key {key!r}; expected {', '.join(known)}{_nearest(key, known)}")
        elif key in keys:
            problems.add(path, line, f"key {key!r} is given twice")
        else:
            keys[key] = value_node
    return keys


def _yaml_text(path: Path, keys: Mapping[str, yaml.Node], key: str, parent: yaml.Node, problems: _Problems) -> str:
    """The text under a key, or "" after having reported why there is none."""
    node = keys.get(key)
    if node is None:
        problems.add(path, parent.start_mark.line + 1, f"key {key!r} is missing")
        return ""
    if not isinstance(node, yaml.ScalarNode) or not str(node.value).strip():
        problems.add(
            path, node.start_mark.line + 1, f"{key} is not a text; expected something like {key}: icon_captions"
        )
        return ""
    complaint = text_complaint(str(node.value)) or (path_complaint(str(node.value)) if key != "metric" else None)
    if complaint:
        problems.add(path, node.start_mark.line + 1, f"{key} {complaint}")
        return ""
    return str(node.value)


def _nearest(word: str, known: Iterable[str]) -> str:
    hint = did_you_mean(word, known)
    return f" ({hint})" if hint else ""


def _read_task(
    folder: Path,
    entry: _TaskEntry,
    problems: _Problems,
    seen: Seen,
    sizes: dict[Path, tuple[int, int]] | None,
    leaks: LeakFinder | None,
    *,
    decode: bool,
    rows: Literal["memory", "disk"],
) -> Task:
    directory = folder / entry.directory
    splits: dict[str, Sequence[Sample]] = dict.fromkeys(SPLITS, ())
    if not directory.is_dir():
        problems.add(folder / STREAM_FILE, entry.line, f"task {entry.name!r}: directory {entry.directory!r} is missing")
        return Task(name=entry.name, metric=entry.metric, **splits)
    for split in SPLITS:
        found = tables_of(directory, split)
        if not found:
            if split != "validation":
                path = directory / f"{split}.jsonl"
                problems.add(path, None, f"file is missing; task {entry.name!r} needs a {split} split")
            continue
        if len(found) > 1:
            others = " and ".join(table.path.relative_to(directory).as_posix() for table in found[1:])
            problems.add(found[0].path, None, f"the {split} split is also in {others}; expected one of them")
            continue
        before = len(problems.found)
        parsed = _checked_rows(found[0], split, entry, problems, seen, sizes, leaks, decode=decode)
        count = 0
        if rows == "disk":
            with SampleWriter() as writer:
                for sample in parsed:
                    # A finding means no stream, and a text with a finding may be one that no file can hold.
                    if not problems.found:
                        writer.add(sample)
            splits[split], count = writer.samples, writer.count
        else:
            splits[split] = tuple(parsed)
            count = len(splits[split])
        # A file whose lines were rejected is not also reported as too small: the lines are what to mend.
        if len(problems.found) == before:
            _check_size(found[0].path, split, entry, count, problems)
            if split == "test":
                for complaint in METRICS[entry.metric].check_split(splits[split]):
                    problems.add(found[0].path, None, complaint)
    return Task(name=entry.name, metric=entry.metric, **splits)


def _checked_rows(
    table: Table,
    split: str,
    entry: _TaskEntry,
    problems: _Problems,
    seen: Seen,
    sizes: dict[Path, tuple[int, int]] | None,
    leaks: LeakFinder | None,
    *,
    decode: bool,
) -> Iterator[Sample]:
    """The samples of a split; every finding about a row is in `problems` when the last one has been taken."""
    waiting: list[_Row] = []
    for number, pairs in _numbered_rows(table, problems):
        sample = _check_row(table, number, pairs, split, entry, problems)
        if sample is None:
            continue
        first = seen.first(f"id {entry.name}", sample.id, f"{table.path.name}:{number}")
        if first is not None:
            problems.add(table.path, number, f"id {sample.id!r} is already used in {first}; ids are unique in a task")
        if leaks is not None:
            leaks.add(entry.name, split, problems.place(table.path, number), sample)
        waiting.append(_Row(table.path, number, sample))
        if len(waiting) == CHECKED_TOGETHER:
            _check_new_images(waiting, problems, seen, sizes, decode=decode)
            waiting = []
        yield sample
    _check_new_images(waiting, problems, seen, sizes, decode=decode)


def _check_new_images(
    rows: Sequence[_Row],
    problems: _Problems,
    seen: Seen,
    sizes: dict[Path, tuple[int, int]] | None,
    *,
    decode: bool,
) -> None:
    """Check the images of rows, without those that earlier rows had and that were sound; note their sizes if asked."""
    found: dict[str, bool] = {}
    for row in rows:
        for image in row.sample.images:
            found.setdefault(str(image), seen.known("image", str(image)))
    unknown = [row for row in rows if not all(found[str(image)] for image in row.sample.images)]
    before = len(problems.found)
    found_sizes = _check_images(unknown, problems, decode=decode)
    if sizes is not None:
        sizes.update(found_sizes)
    if len(problems.found) == before:
        for name in found:
            seen.first("image", name, "")


def _check_row(
    table: Table, number: int, pairs: _Pairs, split: str, entry: _TaskEntry, problems: _Problems
) -> Sample | None:
    """The sample of one row of whatever format, or None where its fields cannot even be read. Adds its findings."""
    name = f"{split}-{number}"
    sample, complaints = _parsed_and_judged(pairs, table.folder, name, entry.metric, test=split != "train")
    for complaint in complaints:
        problems.add(table.path, number, complaint)
    return None if sample is None else replace(sample, taught=entry.taught)


def _parsed_and_judged(
    pairs: _Pairs, directory: Path, name: str, metric: str, *, test: bool
) -> tuple[Sample | None, list[str]]:
    sample, complaints = _parse_sample(pairs, directory, name)
    if sample is not None:
        judge = METRICS[metric]
        complaints = [*complaints, *judge.check_options(sample), *judge.check(sample, test=test)]
    return sample, complaints


def row_findings(pairs: _Pairs, directory: Path, metric: str, *, test: bool) -> list[str]:
    """What a reading would say of a row by itself; its images are not opened."""
    return _parsed_and_judged(pairs, directory, "row", metric, test=test)[1]


def _check_size(path: Path, split: str, entry: _TaskEntry, count: int, problems: _Problems) -> None:
    least = {"train": MINIMUM_TRAIN, "validation": 0, "test": METRICS[entry.metric].minimum_samples}[split]
    if count >= least:
        return
    has = "is empty" if count == 0 else f"has {count} sample{'s' * (count != 1)}"
    why = f"the metric {entry.metric} of task {entry.name!r}" if split == "test" else f"task {entry.name!r}"
    problems.add(path, None, f"the {split} split {has}; {why} needs at least {least}")


def _numbered_rows(table: Table, problems: _Problems) -> Iterator[tuple[int, _Pairs]]:
    """(line or row number, fields) of every row that can be read; findings for the others."""
    if table.kind == "jsonl":
        yield from _json_lines(table.path, problems)
        return
    try:
        yield from table_rows(table)
    # What pyarrow and datasets raise for damaged files, and for tables whose parts differ.
    except (OSError, ValueError, TypeError, KeyError) as error:
        problems.add(table.path, None, f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})")


def _json_lines(path: Path, problems: _Problems) -> Iterator[tuple[int, _Pairs]]:
    with path.open("rb") as file:
        # A file's lines end with b"\n" only: str.splitlines also splits on U+2028 and its like, which JSON may hold.
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if not raw.strip():
                continue
            try:
                text = raw.removesuffix(b"\n").decode("utf-8")
            except UnicodeDecodeError as error:
                problems.add(
                    path, number, f"is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
                )
                continue
            try:
                value = parse_json(text, _Pairs)
            except ValueError as error:
                problems.add(path, number, str(error))
                continue
            if not isinstance(value, _Pairs):
                problems.add(path, number, f"is {_kind(value)}; expected one JSON object per line")
                continue
            yield number, value


def _parse_sample(pairs: _Pairs, directory: Path, name: str) -> tuple[Sample | None, list[str]]:
    """A sample, or None where its fields cannot even be read; and what is wrong. `name`: its id if it may have none."""
    complaints = text_complaints(pairs)
    values: dict[str, Any] = {}
    known = row_keys(key for key, _ in pairs) or _SAMPLE_KEYS
    for key, value in pairs:
        if key == "conversations":
            complaints.append(
                "key 'conversations' is LLaVA's and ShareGPT's; make rows of the file with dmole tasks import"
            )
        elif key not in known:
            complaints.append(f"unknown key {key!r}; expected {', '.join(known)}{_nearest(key, known)}")
        elif key in values:
            complaints.append(f"key {key!r} is given twice")
        else:
            values[key] = value
    turns: tuple[Turn, ...] = ()
    if known is not _SAMPLE_KEYS:
        values, wrong = plain_fields(values, name)
        complaints.extend(wrong)
        if complaints:
            return None, complaints
        turns = values.pop("turns")
    complaints.extend(f"key {key!r} is missing" for key in _REQUIRED_KEYS if key not in values)
    if "image" not in values and "images" not in values:
        complaints.append("key 'image' is missing; expected a path, or images: a list of paths, [] for text alone")
    elif "image" in values and "images" in values:
        complaints.append("has both keys image and images; expected one of them")
    for key in ("id", "image", "instruction"):
        value = values.get(key, "-")
        if not isinstance(value, str):
            complaints.append(f"{key} is {_kind(value)}; expected a string")
        elif not value.strip():
            complaints.append(f"{key} is empty; expected some text")
    for key, least in (("images", 0), ("answers", 1), ("options", 2), ("entities", 0)):
        if key in values:
            complaints.extend(_list_complaints(key, values[key], least))
    if not complaints:
        named = [("image", values["image"])] if "image" in values else [("images", path) for path in values["images"]]
        complaints = [f"{key} {found}" for key, path in named if (found := path_complaint(path))]
    if complaints:
        return None, complaints
    options = tuple(values.get("options", ()))
    if len(set(options)) != len(options):
        complaints.append("options holds a text twice; expected distinct options")
    if len(options) > 26:
        complaints.append(f"options has {len(options)} entries; expected at most 26, one per letter")
    shown = [values["image"]] if "image" in values else values["images"]
    sample = Sample(
        id=values["id"],
        images=tuple(Path(os.path.abspath(directory / image)) for image in shown),
        instruction=values["instruction"],
        answers=tuple(values["answers"]),
        options=options,
        entities=tuple(values.get("entities", ())),
        turns=turns,
    )
    return sample, complaints


def _list_complaints(key: str, value: object, least: int) -> list[str]:
    if not isinstance(value, list) or isinstance(value, _Pairs):
        return [f"{key} is {_kind(value)}; expected a list of strings"]
    if len(value) < least:
        return [f"{key} has {len(value)} entries; expected at least {least}"]
    complaints = []
    for index, item in enumerate(value):
        if not isinstance(item, str):
            complaints.append(f"{key}[{index}] is {_kind(item)}; expected a string")
        elif not item.strip():
            complaints.append(f"{key}[{index}] is empty; expected some text")
    return complaints


def _check_images(rows: Sequence[_Row], problems: _Problems, *, decode: bool) -> dict[Path, tuple[int, int]]:
    """Report every row whose image is missing or cannot be decoded; each file is opened once. The sizes of the rest."""
    users: dict[Path, list[_Row]] = {}
    for row in rows:
        for image in dict.fromkeys(row.sample.images):
            users.setdefault(image, []).append(row)
    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=4) as pool:
        # Pillow only warns about a suspiciously large picture; for an unattended run that is a defect of the data. Its
        # other warnings are about metadata.
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        reports = dict(zip(users, pool.map(_decoded if decode else _exists, users), strict=True))
    for path, report in reports.items():
        for row in users[path]:
            shown = f"image {_shown(path, row.file.parent)}"
            if report.complaint is not None:
                problems.add(row.file, row.line, f"{shown} {report.complaint}")
        for note in report.notes:
            problems.note(users[path][0].file, users[path][0].line, f"{shown} {note}")
    return {path: report.size for path, report in reports.items() if report.size is not None}


def _shown(path: Path, directory: Path) -> str:
    return path.relative_to(directory).as_posix() if path.is_relative_to(directory) else str(path)


def _exists(path: Path) -> ImageReport:
    return ImageReport(complaint=None if path.is_file() else "is missing; paths are relative to the .jsonl file")


def _decoded(path: Path) -> ImageReport:
    return inspect_image(path) if path.is_file() else _exists(path)
