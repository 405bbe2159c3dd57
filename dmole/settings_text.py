# SPDX-License-Identifier: Apache-2.0
"""Every setting with its value and its comment: what `dmole config` prints.

The one source is the code that reads the settings. A setting's comment is the one above its field in the dataclass, a
section's is the first sentence of the class's docstring, and values and choices are those of the fields.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dmole.config import RunConfig
from dmole.methods import method_class, method_names

WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One field. `path` is dotted, as `--set` takes it; `section` is true for a dataclass of further settings."""

    path: str
    value: Any
    kind: str
    comment: str
    section: bool

    @property
    def depth(self) -> int:
        return self.path.count(".")

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


def settings(config: RunConfig) -> list[Setting]:
    """Every setting of a run: the common ones, then the options of each method that has some, under its name."""
    plain = config.to_dict()
    found = list(_of(RunConfig, plain, "", leave_out=("options",)))
    for method in method_names():
        options = method_class(method).Options
        if dataclasses.fields(options):
            value = dataclasses.asdict(config.method_settings(method).options)
            found.append(Setting(path=method, value=value, kind="section", comment=_about(options), section=True))
            found += _of(options, value, f"{method}.")
    return found


def _of(kind: type[Any], plain: Mapping[str, Any], prefix: str, leave_out: tuple[str, ...] = ()) -> Iterator[Setting]:
    hints, comments = typing.get_type_hints(kind), field_comments(kind)
    for spec in dataclasses.fields(kind):
        if spec.name in leave_out:
            continue
        hint, value, path = hints[spec.name], plain[spec.name], f"{prefix}{spec.name}"
        if dataclasses.is_dataclass(hint):
            section = typing.cast(type[Any], hint)
            yield Setting(path=path, value=value, kind="section", comment=_about(section), section=True)
            yield from _of(section, value, f"{path}.")
        else:
            yield Setting(path=path, value=value, kind=_kind(hint), comment=comments[spec.name], section=False)


def _about(kind: type[Any]) -> str:
    """The first paragraph of the class's docstring on one line."""
    return " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())


def field_comments(kind: type[Any]) -> dict[str, str]:
    """The comment lines directly above each field of a dataclass, joined; "" where there are none."""
    source = textwrap.dedent(inspect.getsource(kind))
    lines = source.splitlines()
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    comments: dict[str, str] = {}
    for node in definition.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        above: list[str] = []
        place = node.lineno - 2
        while lines[place].strip().startswith("#"):
            above.insert(0, lines[place].strip().removeprefix("#").strip())
            place -= 1
        comments[node.target.id] = " ".join(above)
    return comments


def _kind(hint: Any) -> str:
    """A type in words, its choices where it has some."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if argument is type(None) else _kind(argument) for argument in arguments)
    if origin is Literal:
        return ", ".join(str(choice) for choice in arguments)
    if origin is tuple:
        return f"list of {_kind(arguments[0])}"
    if origin is not None and issubclass(origin, Mapping):
        values = "value" if arguments[1] is Any else _kind(arguments[1])
        return f"{values} by name"
    return {bool: "true or false", int: "integer", float: "number", str: "text"}[hint]


def yaml_text(config: RunConfig) -> str:
    """Every setting as YAML with its comment above it; `dmole run --config` reads it back."""
    lines: list[str] = []
    depth = 0
    for setting in settings(config):
        indent = "  " * setting.depth
        if lines and (setting.section or setting.depth < depth):
            lines.append("")
        depth = setting.depth
        kind = "" if setting.section else f" [{setting.kind}]"
        lines += textwrap.wrap(
            f"{setting.comment}{kind}", WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
        )
        # JSON is YAML, and says in one line what a list or a mapping holds.
        value = "" if setting.section else f" {json.dumps(setting.value, ensure_ascii=False)}"
        lines.append(f"{indent}{setting.name}:{value}")
    return "\n".join(lines) + "\n"
