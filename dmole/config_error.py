# SPDX-License-Identifier: Apache-2.0
"""The error of every setting that cannot be, and the check that raises it."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key, what it got and what it takes."""


def require(condition: bool, name: str, got: object, expected: str) -> None:
    """Raise `ConfigError` for setting `name` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{name} is {got!r}; expected {expected}.")
