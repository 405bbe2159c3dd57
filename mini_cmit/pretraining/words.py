# SPDX-License-Identifier: Apache-2.0
"""The words that pretraining writes on pictures: common English, place names, names of icons and colours.

No film title is among them: the poster task's titles come from another file, and a test holds the two apart.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pydoc_data.topics import topics

from mini_cmit.pretraining.scene import COLOURS
from mini_cmit.tasks.icons import icons_in_pool

_SHORTEST, _LONGEST = 2, 9


@cache
def words() -> tuple[str, ...]:
    """Lower-case words of 2 to 9 letters, sorted: the Python language reference's, icons' and colours'."""
    counted = Counter(re.findall(r"\b[a-z]+\b", " ".join(topics[name] for name in sorted(topics)).lower()))
    common = {word for word, count in counted.items() if count >= 4}
    named = {word for icon in icons_in_pool("pretraining") for word in icon.phrase.split()}
    chosen = common | named | set(COLOURS)
    return tuple(sorted(word for word in chosen if _SHORTEST <= len(word) <= _LONGEST and word.isascii()))
