# SPDX-License-Identifier: Apache-2.0
"""Task 3, poster captions (the form of TextCaps): a film's title in real fonts, one word of it large; metric CIDEr.

A caption names the large word, its place and the two colours. The rest of the title is set small, as on a poster; it is
there to be seen past. Directors are left out: no name recurs often enough for a small model to learn to read it.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Final

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from mini_cmit.tasks.building import (
    CAPTION_INSTRUCTION,
    BuildContext,
    Drawn,
    TaskRows,
    build_task,
    contrasting_pair,
    rgb,
    textured_canvas,
)
from mini_cmit.tasks.films import Film, films_in_pool
from mini_cmit.tasks.icons import with_article

NAME: Final = "poster_captions"
METRIC: Final = "cider_percent"
PALETTE: Final = ("red", "yellow", "green", "blue", "purple", "pink", "black", "white")
FONTS: Final = ("DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono-Bold.ttf", "STIXGeneralBol.ttf")
PLACES: Final = ("top", "middle", "bottom")


@cache
def _films(pool: str) -> dict[str, tuple[Film, ...]]:
    by_word: dict[str, list[Film]] = {}
    for film in films_in_pool(pool):
        by_word.setdefault(film.word, []).append(film)
    return {word: tuple(films) for word, films in by_word.items()}


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _fitting_font(name: str, text: str, width: float, height: float) -> ImageFont.FreeTypeFont:
    """The largest size at which the text's ink fits the box; ink grows linearly, so one trial size is enough."""
    left, top, right, bottom = _font(name, 100).getbbox(text)
    return _font(name, max(6, int(100 * min(width / (right - left), height / (bottom - top)))))


def _line(text: str, font: ImageFont.FreeTypeFont, colour: tuple[int, int, int]) -> Image.Image:
    """The text cropped to its ink, as an RGBA layer."""
    left, top, right, bottom = (round(edge) for edge in font.getbbox(text))
    layer = Image.new("RGBA", (right - left, bottom - top), (*colour, 0))
    ImageDraw.Draw(layer).text((-left, -top), text, font=font, fill=(*colour, 255))
    return layer


def captions(film: Film, colour: str, background: str, place: str) -> tuple[str, ...]:
    """The training target, three paraphrases and one reference that gives the whole title."""
    poster = with_article(f"{background} poster")
    spot = "in the middle" if place == "middle" else f"at the {place}"
    return (
        f"{poster} with the word {film.word} in {colour} letters {spot}",
        f"the word {film.word} in {colour} letters {spot} of {poster}",
        f"{poster} that says {film.word} {spot} in {colour}",
        f"{colour} letters {spot} of {poster} read {film.word}",
        f"{poster} of the film {film.title} with {colour} letters {spot}",
    )


def draw(rng: random.Random, pool: str, side: int) -> Drawn:
    """The large word over nine tenths of the width, the words before and after it small above and below."""
    by_word = _films(pool)
    film = rng.choice(by_word[rng.choice(list(by_word))])
    colour, background = contrasting_pair(rng, PALETTE, gap=0.45)
    place = rng.choice(PLACES)
    font = rng.choice(FONTS)
    image = textured_canvas(rng, side, background)
    small = side * 0.075
    lines = []
    for text in (film.before, film.word, film.after):
        if text:
            large = text == film.word
            shown = text.upper()
            fitting = _fitting_font(font, shown, side * (0.92 if large else 0.8), side * 0.3 if large else small)
            lines.append(_line(shown, fitting, rgb(colour)))
    gap = round(side * 0.045)
    height = sum(line.height for line in lines) + gap * (len(lines) - 1)
    margin = round(side * 0.06)
    top = {"top": margin, "middle": (side - height) // 2, "bottom": side - margin - height}[place]
    for line in lines:
        image.paste(line, ((side - line.width) // 2, top), line)
        top += line.height + gap
    return Drawn(
        image=image,
        instruction=CAPTION_INSTRUCTION,
        answers=captions(film, colour, background, place),
        entities=(film.entity,),
    )


def build(context: BuildContext) -> TaskRows:
    """The rows of the task; its images are written below `context.root`."""
    return build_task(context, NAME, METRIC, draw)
