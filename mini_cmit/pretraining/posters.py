# SPDX-License-Identifier: Apache-2.0
"""Large printed words: film titles and place names that no task uses."""

from __future__ import annotations

import random
from functools import cache

from PIL import Image

from mini_cmit.pretraining.scene import SIDE, Scene, Turn, multiple_choice
from mini_cmit.pretraining.words import words
from mini_cmit.pretraining.writing import FONTS, contrast, text_layer
from mini_cmit.tasks.countries import countries
from mini_cmit.tasks.films import films_in_pool
from mini_cmit.tasks.sources import read_table

_PLACES = ("top", "middle", "bottom")


@cache
def place_names() -> tuple[str, ...]:
    """Every 30th city name of 3 to 9 plain letters (bokeh-sampledata, GeoNames, CC-BY), without the capitals."""
    answers = {text.lower() for country in countries("train") for text in (country.name, country.capital)}
    names = sorted({row["name"] for row in read_table("bokeh_sampledata", "_data", "world_cities.csv.gz")})
    plain = [n for n in names if n.isascii() and n.isalpha() and 3 <= len(n) <= 9 and n.lower() not in answers]
    return tuple(plain[::30])


def poster_scene(rng: random.Random) -> Scene:
    """One large word near the top, the middle or the bottom, with or without a small line; words of any kind."""
    kind = rng.random()
    if kind < 0.3:
        film = rng.choice(films_in_pool("pretraining"))
        word, small = film.word, film.before or film.after
    elif kind < 0.7:
        word, small = rng.choice(place_names()), ""
    else:
        word, small = rng.choice(words()), rng.choice(words()) if rng.random() < 0.4 else ""
    ground, ground_rgb, ink, ink_rgb = contrast(rng)
    image = Image.new("RGB", (SIDE, SIDE), ground_rgb)
    place = rng.choice(_PLACES)
    shown = rng.choice((word, word.upper(), word.capitalize()))
    bold = tuple(name for name in FONTS if "Bol" in name)
    layer = text_layer(rng, shown, ink_rgb, rng.randint(40, 64), 0.0, faces=bold if rng.random() < 0.7 else FONTS)
    top = {
        "top": rng.randint(4, 14),
        "middle": (SIDE - layer.height) // 2 + rng.randint(-6, 6),
        "bottom": SIDE - layer.height - rng.randint(4, 14),
    }[place]
    image.paste(layer, (max(0, (SIDE - layer.width) // 2), top), layer)
    if small:
        line = text_layer(rng, small.upper(), ink_rgb, 15, 0.0)
        y = top + layer.height + 6 if place != "bottom" else top - line.height - 6
        image.paste(line, ((SIDE - line.width) // 2, y), line)
    others = rng.sample(words(), 8)
    turns = [
        Turn("What is the large word? Answer briefly.", word),
        Turn("Spell the large word.", " ".join(word.lower())),
        multiple_choice(rng, "Which word is printed?", word, others),
        Turn("What color are the letters? Answer briefly.", ink),
        Turn("What color is the background? Answer briefly.", ground),
        Turn("How high is the word? Answer briefly.", place),
        Turn("Is there small text? Answer briefly.", "yes" if small else "no"),
    ]
    first, rest = turns[0], turns[1:]
    rng.shuffle(rest)
    return Scene(image, tuple([first, *rest[:4]]))
