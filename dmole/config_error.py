# SPDX-License-Identifier: Apache-2.0
"""The error of every setting that cannot be, and the check that raises it."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key, what it got and what it takes."""


def require(condition: bool, name: str, got: object, expected: str) -> None:
    """Raise `ConfigError` for setting `name` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{name} is {got!r}; expected {expected}.")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Such as "did you mean 'rank'?"; "" where no known name is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else ""
