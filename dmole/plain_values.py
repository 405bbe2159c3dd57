# SPDX-License-Identifier: Apache-2.0
"""What a setting can be at all: checked before anything looks at which setting it is."""

from collections.abc import Mapping

from dmole.config_error import ConfigError
from dmole.strict_yaml import DEEPEST


def check_plain(value: object, where: str = "configuration", depth: int = 0) -> None:
    """Raise ConfigError for nesting beyond DEEPEST, keys that are no texts, integers beyond 64 bits, and texts that no
    file can hold (half surrogate pairs, NUL), anywhere in `value`."""
    shown = ascii(where[:80])[1:-1]
    if depth > DEEPEST:
        raise ConfigError(f"{shown} is nested deeper than {DEEPEST}; expected flat settings.")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{shown} has a key of type {type(key).__name__}; expected a name.")
            check_plain(key, f"a key of {where}", depth)
            check_plain(inner, f"{where}.{key}" if depth else key, depth + 1)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            check_plain(inner, f"{where}[{index}]", depth + 1)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{shown} holds half of a surrogate pair; expected whole characters.") from error
        if "\0" in value:
            raise ConfigError(f"{shown} holds the character NUL; expected text without it.")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{shown} is an integer of {value.bit_length()} bits; expected one of 64 bits.")
