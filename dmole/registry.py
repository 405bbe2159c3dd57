# SPDX-License-Identifier: Apache-2.0
"""Names that packages add to dmole by entry points of their pyproject.toml, this project's benchmark like anybody's.

    dmole.methods    name = "package.module:Class"       a subclass of `dmole.methods.Method`, called `name`
    dmole.metrics    name = "package.module:Class"       a subclass of `dmole.metrics.Metric`, called `name`
    dmole.recipes    name = "package.module:function"    () -> a `dmole.config.RunConfig`
    dmole.models     name = "package.module:function"    () -> a folder in transformers' format
    dmole.streams    name = "package.module:function"    (say) -> a folder with stream.yaml, checked by the package;
                                                         say(line) tells the user what takes long
    dmole.doctor     name = "package.module:function"    () -> a list of `dmole.doctor.Finding`

Names are known without an import; what a name stands for is imported when it is asked for, and checked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, Literal, TypeVar, get_args

from dmole.config_error import ConfigError

Group = Literal[
    "dmole.methods", "dmole.metrics", "dmole.recipes", "dmole.models", "dmole.streams", "dmole.doctor"
]  # fmt: skip
GROUPS: tuple[Group, ...] = get_args(Group)
T = TypeVar("T")


def registered(group: Group) -> dict[str, EntryPoint]:
    """{name: entry point} of the installed packages, by name. ConfigError for a name that two packages register."""
    found: dict[str, EntryPoint] = {}
    for point in _entry_points(group, tuple(sys.path)):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise ConfigError(
                f"{group}: got {point.name!r} twice, {described(other)} and {described(point)}; expected each name "
                "once. Uninstall one of the two packages."
            )
    return found


@cache
def _entry_points(group: Group, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Sorted. Reading the metadata of all packages on `path` takes tens of milliseconds."""
    return tuple(sorted(entry_points(group=group), key=lambda point: (point.name, point.value)))


def described(point: EntryPoint) -> str:
    """Where an entry point comes from, such as "somebody_method:Method of the package somebody"."""
    return f"{point.value} of the package {point.dist.name}" if point.dist is not None else point.value


def load(point: EntryPoint) -> object:
    """What an entry point names. ConfigError, with the package's name, for whatever keeps it from being imported."""
    try:
        return point.load()
    except Exception as error:  # a package that fails to import raises whatever it likes
        raise wrong(point, f"which fails to import ({type(error).__name__}: {error})", "an importable name") from error


def wrong(point: EntryPoint, got: str, expected: str) -> ConfigError:
    """The error for an entry point that is not what its group asks for."""
    package = point.dist.name if point.dist is not None else "its package"
    return ConfigError(
        f"{point.group}: got {point.name!r}, {described(point)}, {got}; expected {expected}. Mend or uninstall "
        f"{package}."
    )


class Registry(Mapping[str, T], Generic[T]):
    """{name: value}: our own, and those of the entry points of a group. Values are loaded when they are asked for.

    Args:
        group: of the entry points.
        own: our own names, without an entry point each, and what each stands for.
        check: the value that an entry point's object stands for; raises `wrong(point, ...)` where it stands for none.
    """

    def __init__(
        self,
        group: Group,
        *,
        own: Callable[[], Mapping[str, Callable[[], T]]] = dict,
        check: Callable[[EntryPoint, object], T],
    ) -> None:
        self.group, self._own, self._check = group, own, check

    def _known(self) -> dict[str, Callable[[], T] | EntryPoint]:
        own, others = self._own(), registered(self.group)
        for name in own:
            if name in others:
                raise ConfigError(
                    f"{self.group}: got {name!r}, {described(others[name])}, a name of dmole's own; expected another "
                    "one. Rename or uninstall it."
                )
        every: dict[str, Callable[[], T] | EntryPoint] = {**own, **others}
        return {name: every[name] for name in sorted(every)}

    def __getitem__(self, name: str) -> T:
        found = self._known()[name]
        return self._check(found, load(found)) if isinstance(found, EntryPoint) else found()

    def __contains__(self, name: object) -> bool:
        return name in self._known()

    def __iter__(self) -> Iterator[str]:
        return iter(self._known())

    def __len__(self) -> int:
        return len(self._known())


def called(point: EntryPoint, value: object) -> Callable[..., object]:
    """The function that an entry point names."""
    if not callable(value) or isinstance(value, type):
        raise wrong(point, f"a {type(value).__name__}", "a function")
    return value


def subclass(point: EntryPoint, value: object, base: type[T]) -> type[T]:
    """The class that an entry point names: a whole subclass of `base` that is called like the entry point."""
    if not isinstance(value, type) or not issubclass(value, base):
        raise wrong(point, f"a {type(value).__name__}", f"a subclass of {base.__module__}.{base.__qualname__}")
    if missing := sorted(getattr(value, "__abstractmethods__", ())):
        raise wrong(point, f"which does not define {', '.join(missing)}", f"every hook of {base.__qualname__}")
    if getattr(value, "name", None) != point.name:
        raise wrong(point, f"whose name is {getattr(value, 'name', None)!r}", f"name = {point.name!r} in the class")
    return value
