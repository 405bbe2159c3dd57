# SPDX-License-Identifier: Apache-2.0
"""Film titles that hold one word of a closed vocabulary, by pool.

Source: the films of `bokeh_sampledata` (Wikidata, CC0). A small model does not learn free reading, so a poster sets one
word of the title large, and that word is one of `WORDS`, each of which some tens of titles share. The titles, as
strings, are disjoint between the pools; that the words recur is the point.
"""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from typing import Final

from mini_cmit.tasks.building import pool_of
from mini_cmit.tasks.sources import package_file

# Frequent words of three to six letters, without names of colours (a caption speaks of colours too), and without
# pairs that one letter tells apart (man and men, dead and death).
WORDS: Final = (
    "big", "blood", "city", "dark", "day", "dead", "girl", "good", "house", "king",
    "last", "life", "little", "love", "man", "night", "story", "time", "war", "wild",
)  # fmt: skip
MAX_WORDS: Final = 4
MAX_LETTERS: Final = 10


@dataclass(frozen=True, kw_only=True)
class Film:
    """A title in three pieces: "The Last Night" is ("the", "last", "night") when the word is "last"."""

    entity: str
    title: str
    before: str
    word: str
    after: str


@cache
def all_films() -> tuple[Film, ...]:
    """Every usable title once, in alphabetical order."""
    path = package_file("bokeh_sampledata", "_data", "movies.db")
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        titles = {" ".join(title.split()).lower() for (title,) in connection.execute("select Title from omdb")}
    films = []
    for title in sorted(titles):
        words = title.split(" ")
        places = [place for place, word in enumerate(words) if word in WORDS]
        short = len(words) <= MAX_WORDS and max(map(len, words)) <= MAX_LETTERS
        if len(places) == 1 and short and re.fullmatch("[a-z ]+", title):
            place = places[0]
            films.append(
                Film(
                    entity=f"film/{title}",
                    title=title,
                    before=" ".join(words[:place]),
                    word=words[place],
                    after=" ".join(words[place + 1 :]),
                )
            )
    return tuple(films)


def films_in_pool(pool: str) -> tuple[Film, ...]:
    """The films of one pool ("pretraining", "train", "validation" or "test"), in alphabetical order."""
    return tuple(film for film in all_films() if pool_of(film.entity) == pool)
