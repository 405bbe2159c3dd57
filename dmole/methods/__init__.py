# SPDX-License-Identifier: Apache-2.0
"""The methods by name: each is one file or folder here with one subclass of `Method`, named like the file.

A new file here is a new method for `dmole run`, with its options and its columns: nothing is registered by hand.
Packages add theirs by entry points (`dmole.registry`).
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import EntryPoint

from dmole.methods.base import Method
from dmole.registry import Registry, subclass, wrong

__all__ = ["Method", "method_class", "method_names"]

# What the files beside the methods are: the hooks, and what every method is given.
SHARED = ("base", "budget", "settings")


def method_names() -> tuple[str, ...]:
    """The names that `methods:` in a configuration takes, in alphabetical order."""
    return tuple(_METHODS)


def method_class(name: str) -> type[Method]:
    """The `Method` subclass called `name`. ConfigError for a package's that is not one, or cannot be imported."""
    if name not in _METHODS:
        raise ValueError(f"method is {name!r}; expected one of {', '.join(_METHODS)}.")
    return _METHODS[name]


def _own() -> Mapping[str, Callable[[], type[Method]]]:
    files = (module.name for module in pkgutil.iter_modules(__path__))
    return {name: partial(_own_class, name) for name in files if name not in SHARED and not name.startswith("_")}


def _own_class(name: str) -> type[Method]:
    module = importlib.import_module(f"{__name__}.{name}")
    named = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        and value.__module__.startswith(module.__name__)
        and getattr(value, "name", None) == name
    ]
    if len(named) != 1:
        raise ValueError(f"{module.__name__} defines {len(named)} methods called {name!r}; expected exactly one.")
    return named[0]


def _checked(point: EntryPoint, value: object) -> type[Method]:
    found = subclass(point, value, Method)  # type: ignore[type-abstract]
    if not re.fullmatch(r"[a-z][a-z0-9_]*", found.name):
        raise wrong(point, "which names folders and settings", "lower-case letters, digits and '_' as its name")
    options = found.Options
    if not dataclasses.is_dataclass(options) or not isinstance(options, type):
        raise wrong(point, f"whose Options is {options!r}", "a frozen dataclass as Options")
    return found


_METHODS = Registry[type[Method]]("dmole.methods", own=_own, check=_checked)
