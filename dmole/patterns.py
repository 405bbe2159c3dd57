# SPDX-License-Identifier: Apache-2.0
"""Regular expressions that users give, matched in bounded time.

`(a+)+b` takes 2^n steps on n letters. No rule over patterns finds all such and refuses no good one, so the matching is
bounded: the library `regex` stops after `SECONDS`.
"""

import math
import re

import regex

from dmole.config_error import ConfigError

SECONDS = 1.0
LONGEST = 2000
# Of the counts in {...}, one times the other as if nested: `regex` takes about 260 bytes for each repetition.
REPETITIONS = 100_000


def check_pattern(name: str, pattern: str) -> None:
    """Raise ConfigError unless `pattern`, the setting `name`, is a regular expression."""
    try:
        if len(pattern) > LONGEST:
            raise ValueError(f"it has {len(pattern)} characters, at most {LONGEST} are read")
        counts = re.findall(r"\d+", " ".join(re.findall(r"\{([^{}]*)\}", pattern)))
        if math.prod(max(1, int(count)) for count in counts) > REPETITIONS:
            raise ValueError(f"its counts repeat more than {REPETITIONS} times")
        regex.compile(pattern)
    except (regex.error, ValueError, OverflowError, RecursionError, MemoryError, IndexError, KeyError) as error:
        raise ConfigError(f"{name} is {pattern[:80]!r}; expected a regular expression ({error}).") from error


def matches(name: str, pattern: str, text: str, *, whole: bool) -> bool:
    """Whether `pattern`, the setting `name`, is found in `text`, or matches the whole of it.

    Raises ConfigError after SECONDS.
    """
    try:
        match = regex.fullmatch if whole else regex.search
        return match(pattern, text, timeout=SECONDS) is not None
    except TimeoutError as error:
        raise ConfigError(
            f"{name} is {pattern[:80]!r}; expected a regular expression that is matched in {SECONDS:g} s, which this "
            f"one is not on {text[:80]!r}. Take nested repetitions like (a+)+ apart."
        ) from error
