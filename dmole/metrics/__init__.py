# SPDX-License-Identifier: Apache-2.0
"""Task metrics by name, and the aggregates of continual learning (`dmole.reports.continual`).

A metric is a class of a file here with a name of its own: a new file is a new metric, nothing is registered by hand.
Packages add theirs by entry points (`dmole.registry`). Older versions of a metric are in `earlier/`.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.metadata import EntryPoint

from dmole.metrics.base import Metric, SampleMetric, Scorable
from dmole.registry import Registry, subclass

__all__ = ["METRICS", "Metric", "SampleMetric", "Scorable"]


@cache
def _classes() -> Mapping[str, type[Metric]]:
    """Every class of the files here that has a name."""
    found: dict[str, type[Metric]] = {}
    for file in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{file.name}")
        for value in vars(module).values():
            if not isinstance(value, type) or not issubclass(value, Metric) or value.__module__ != module.__name__:
                continue
            if inspect.isabstract(value):
                continue
            if value.name in found:
                raise ValueError(
                    f"metrics: got {value.name!r} twice, in {found[value.name].__module__} and {value.__module__}; "
                    "expected each name once. Rename one of them."
                )
            found[value.name] = value
    return found


def _own() -> Mapping[str, Callable[[], Metric]]:
    return {name: partial(_made, kind) for name, kind in _classes().items()}


def _checked(point: EntryPoint, value: object) -> Metric:
    return _made(subclass(point, value, Metric))  # type: ignore[type-abstract]


@cache
def _made(kind: type[Metric]) -> Metric:
    return kind()


METRICS: Mapping[str, Metric] = Registry[Metric]("dmole.metrics", own=_own, check=_checked)
