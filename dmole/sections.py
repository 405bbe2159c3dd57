# SPDX-License-Identifier: Apache-2.0
"""A frozen dataclass from nested mappings, such as YAML gives; unknown keys and wrong types are errors."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from dmole.config_error import ConfigError, did_you_mean, require
from dmole.models.declaration import Declaration, read_declaration

T = TypeVar("T")


def nearest(key: str, known: Sequence[str]) -> str:
    """The end of an error about an unknown name: a close one if there is one, and all of them."""
    return f"{did_you_mean(key, known)} Known: {', '.join(known)}.".lstrip()


def build_section(kind: type[T], plain: object, where: str = "", **given: Any) -> T:
    """Dataclass `kind` from a mapping; `where` is the dotted path for messages."""
    if not isinstance(plain, Mapping):
        raise ConfigError(f"{where or 'configuration'} is {plain!r}; expected a mapping of settings.")
    hints = typing.get_type_hints(kind)
    section: Any = kind
    known = [spec.name for spec in dataclasses.fields(section) if spec.name not in given]
    values: dict[str, Any] = dict(given)
    for key, value in plain.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in known:
            explained = section.unknown(str(key), path) if hasattr(section, "unknown") else None
            raise explained or ConfigError(f"unknown key {path!r}; {nearest(str(key), known)}")
        values[key] = _convert(hints[key], value, path)
    return kind(**values)


def _convert(hint: Any, value: object, path: str) -> Any:
    """`value` as the type `hint`, or a `ConfigError` at `path`. Nothing is guessed: '3' is no integer."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Declaration:
        require(isinstance(value, Mapping), path, value, "a mapping of fields")
        return read_declaration(typing.cast(Mapping[str, Any], value))
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _convert(inner, value, path)
    if origin is Literal:
        if value is False and "no" in arguments:
            value = "no"  # which YAML reads as false
        require(value in arguments, path, value, "one of " + ", ".join(repr(choice) for choice in arguments))
        return value
    if origin is tuple:
        # One value stands for a list of one: `--set methods=dmole`.
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(items))
    if origin is not None and issubclass(origin, Mapping):
        require(isinstance(value, Mapping), path, value, "a mapping")
        return {str(k): _convert(arguments[1], v, f"{path}.{k}") for k, v in typing.cast(Any, value).items()}
    if dataclasses.is_dataclass(hint):
        return build_section(typing.cast(type[Any], hint), value, path)
    if hint is bool:
        require(isinstance(value, bool), path, value, "true or false")
    elif hint is int:
        require(isinstance(value, int) and not isinstance(value, bool), path, value, "an integer")
    elif hint is float:
        # YAML 1.1 reads 1e-3 (no dot) as a string.
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
            value = float(value)
        require(isinstance(value, int | float) and not isinstance(value, bool), path, value, "a number")
        value = float(typing.cast(float, value))
        require(math.isfinite(value), path, value, "a finite number")
    elif hint is str:
        require(isinstance(value, str), path, value, "a string")
    return value
