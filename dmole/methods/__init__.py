# SPDX-License-Identifier: Apache-2.0
"""The methods by name. A method is one file of this folder with one subclass of `Method`, named like the file.

Nothing is registered by hand: a new file here is a new method for `dmole run`, its options and its tests.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from dmole.methods.base import Method

__all__ = ["Method", "method_class", "method_names"]


@cache
def method_names() -> tuple[str, ...]:
    """The names that `methods:` in a configuration takes, in alphabetical order."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in found if name not in ("base", "settings") and not name.startswith("_")))


@cache
def method_class(name: str) -> type[Method]:
    """The `Method` subclass that the file called `name` defines."""
    if name not in method_names():
        raise ValueError(f"method is {name!r}; expected one of {', '.join(method_names())}.")
    module = importlib.import_module(f"{__name__}.{name}")
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__.startswith(module.__name__)
    ]
    named = [value for value in classes if getattr(value, "name", None) == name]
    if len(named) != 1:
        raise ValueError(f"{module.__name__} defines {len(named)} methods called {name!r}; expected exactly one.")
    return named[0]
