# SPDX-License-Identifier: Apache-2.0
"""Rendered words and numbers in real fonts: what is written, in which colour, where."""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from mini_cmit.pretraining.scene import COLOURS, SIDE, Scene, Turn, background, jittered, multiple_choice

FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSansMono.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "STIXGeneralItalic.ttf",
)


@lru_cache(maxsize=256)
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that matplotlib ships."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def contrast(rng: random.Random) -> tuple[str, tuple[int, int, int], str, tuple[int, int, int]]:
    """Background and ink that stand apart: (name, rgb, name, rgb)."""
    ground, ground_rgb = background(rng)
    dark = sum(ground_rgb) < 330
    inks = [c for c in COLOURS if c != ground and (sum(COLOURS[c]) > 480 if dark else sum(COLOURS[c]) < 400)]
    ink = rng.choice(inks)
    return ground, ground_rgb, ink, jittered(rng, ink)


def text_layer(
    rng: random.Random,
    text: str,
    ink: tuple[int, int, int],
    height: int,
    tilt: float = 0.0,
    faces: tuple[str, ...] = FONTS,
) -> Image.Image:
    """The text alone on transparency, at most 152 wide."""
    face = rng.choice(faces)
    size = height
    while size > 12 and font(face, size).getlength(text) > 148:
        size -= 2
    left, top, right, bottom = font(face, size).getbbox(text)
    layer = Image.new("RGBA", (int(right - left) + 4, int(bottom - top) + 4), (*ink, 0))
    ImageDraw.Draw(layer).text((2 - left, 2 - top), text, font=font(face, size), fill=(*ink, 255))
    return layer.rotate(tilt, expand=True, resample=Image.Resampling.BICUBIC) if tilt else layer


def word_scene(rng: random.Random, words: tuple[str, ...]) -> Scene:
    """One to three words, one a line."""
    count = rng.choices((1, 2, 3), (5, 4, 2))[0]
    chosen = rng.sample(words, count)
    shown = [rng.choice((w, w.capitalize(), w.upper())) for w in chosen]
    ground, ground_rgb, ink, ink_rgb = contrast(rng)
    image = Image.new("RGB", (SIDE, SIDE), ground_rgb)
    band = SIDE // count
    for i, text in enumerate(shown):
        layer = text_layer(
            rng, text, ink_rgb, rng.randint(26, 46) if count < 3 else rng.randint(24, 36), rng.uniform(-6, 6)
        )
        x = rng.randint(0, max(0, SIDE - layer.width))
        y = i * band + rng.randint(0, max(0, band - layer.height))
        image.paste(layer, (x, y), layer)
    turns = [Turn("What does the text say?", " ".join(chosen))]
    other = rng.sample([w for w in words if w not in chosen], 6)
    k = rng.randrange(count)
    turns.append(multiple_choice(rng, f"Which word is on line {k + 1}?", chosen[k], other))
    turns.append(Turn(f"Read line {k + 1}. Answer briefly.", chosen[k]))
    turns.append(Turn(f"Spell line {k + 1}.", " ".join(chosen[k])))
    turns.append(Turn("What color is the text? Answer briefly.", ink))
    turns.append(Turn("What color is the background? Answer briefly.", ground))
    asked = rng.choice(chosen) if rng.random() < 0.5 else other[0]
    turns.append(Turn(f"Does it say {asked}? Answer briefly.", "yes" if asked in chosen else "no"))
    first, rest = turns[0], turns[1:]
    rng.shuffle(rest)
    return Scene(image, tuple([first, *rest[:4]] if rng.random() < 0.6 else rest[:5]))


def number_scene(rng: random.Random) -> Scene:
    """A printed number of one to five digits, tilted and warped a little."""
    digits = "".join(rng.choice("0123456789") for _ in range(rng.choices((1, 2, 3, 4, 5), (3, 4, 4, 3, 1))[0]))
    _, ground_rgb, ink, ink_rgb = contrast(rng)
    image = Image.new("RGB", (SIDE, SIDE), ground_rgb)
    width = min(150 // len(digits), 90)
    x = rng.randint(2, max(3, SIDE - width * len(digits) - 2))
    base = rng.randint(10, SIDE - 10 - min(100, int(width * 1.7)))
    for digit in digits:
        layer = text_layer(rng, digit, ink_rgb, int(width * rng.uniform(1.0, 1.4)), rng.uniform(-14, 14))
        layer = layer.resize((max(6, int(layer.width * rng.uniform(0.85, 1.2))), layer.height))
        layer = layer.crop((0, 0, min(layer.width, width + 4), layer.height))
        image.paste(layer, (x + (width - layer.width) // 2, base + rng.randint(-4, 8)), layer)
        x += width
    k = rng.randrange(len(digits))
    ordinal = ("first", "second", "third", "fourth", "fifth")[k]
    wrong = [f"{v:0{len(digits)}d}" for v in rng.sample(range(10 ** len(digits)), min(8, 10 ** len(digits)))]
    turns = [
        Turn("What number is printed?", digits),
        Turn(f"What is the {ordinal} digit? Answer briefly.", digits[k]),
        Turn("How many digits are there? Answer briefly.", str(len(digits))),
        Turn("Write the digits apart.", " ".join(digits)),
        multiple_choice(
            rng, "Which number is printed?", digits, [w for w in wrong if w != digits] + ["12345", "00", "77777", "421"]
        ),
        Turn("What color is the number? Answer briefly.", ink),
    ]
    first, rest = turns[0], turns[1:]
    rng.shuffle(rest)
    return Scene(image, tuple([first, *rest[:4]] if rng.random() < 0.6 else [*rest[:3], first]))
