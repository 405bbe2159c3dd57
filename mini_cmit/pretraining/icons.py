# SPDX-License-Identifier: Apache-2.0
"""Icons of the pool that no task uses: what they show, alone and in grids; counting, comparing, finding."""

from __future__ import annotations

import random

from PIL import Image

from mini_cmit.pretraining.scene import COLOURS, SIDE, Scene, Turn, background, box_text, multiple_choice
from mini_cmit.tasks.icons import Icon, drawings_in_pool, icon_image, icons_in_pool

_PLACES = ("top left", "top right", "bottom left", "bottom right")


def _ground(rng: random.Random) -> tuple[Image.Image, list[str]]:
    """A background and the colour names that stand out on it."""
    name, rgb = background(rng)
    dark = sum(rgb) < 330
    inks = [c for c in COLOURS if c != name and (sum(COLOURS[c]) > 480 if dark else sum(COLOURS[c]) < 400)]
    return Image.new("RGB", (SIDE, SIDE), rgb), inks


def _stamp(image: Image.Image, name: str, size: int, ink: str, left: int, top: int) -> None:
    layer = icon_image(name, size, "#{:02x}{:02x}{:02x}".format(*COLOURS[ink]))
    image.paste(layer, (left, top), layer)


def icon_scene(rng: random.Random) -> Scene:
    """One large icon."""
    icons = icons_in_pool("pretraining")
    icon = rng.choice(icons)
    image, inks = _ground(rng)
    ink = rng.choice(inks)
    size = rng.randint(90, 150)
    left, top = rng.randint(0, SIDE - size), rng.randint(0, SIDE - size)
    _stamp(image, icon.name, size, ink, left, top)
    phrases = [i.phrase for i in icons]
    turns = [
        Turn("What does the icon show?", icon.phrase),
        Turn("Name the thing. Answer briefly.", icon.noun),
        Turn("What color is the icon? Answer briefly.", ink),
        Turn("Is it solid? Answer briefly.", "yes" if icon.solid else "no"),
        multiple_choice(rng, "Which icon is this?", icon.phrase, phrases),
        multiple_choice(rng, "What is shown?", icon.noun, [i.noun for i in icons]),
    ]
    if icon.addition:
        turns.append(Turn("What is added to it? Answer briefly.", icon.addition))
    first, rest = turns[0], turns[1:]
    rng.shuffle(rest)
    return Scene(image, tuple([first, *rest[:4]] if rng.random() < 0.6 else rest[:5]))


def icon_grid_scene(rng: random.Random) -> Scene:
    """Up to six icons in a grid: how many, what is where, which differs, and the box of one."""
    icons: tuple[Icon, ...] = icons_in_pool("pretraining")
    image, inks = _ground(rng)
    kind = rng.random()
    if kind < 0.4:  # n copies of one icon
        icon, ink = rng.choice(icons), rng.choice(inks)
        count = rng.randint(1, 6)
        cells = (
            rng.sample([(i, j) for i in range(3) for j in range(3)], count) if count > 4 or rng.random() < 0.5 else None
        )
        side = 53 if cells else 80
        cells = cells or rng.sample([(i, j) for i in range(2) for j in range(2)], count)
        for i, j in cells:
            _stamp(image, icon.name, int(side * 0.85), ink, i * side + 4, j * side + 4)
        turns = [
            Turn("How many icons are there? Answer briefly.", str(count)),
            multiple_choice(rng, "How many icons are there?", str(count), [str(n) for n in range(1, 9)]),
            Turn("What does the icon show?", icon.phrase),
            Turn("What color are they? Answer briefly.", ink),
        ]
    elif kind < 0.7:  # three alike and one other
        names = rng.sample(drawings_in_pool("pretraining"), 2)
        odd, ink = rng.randrange(4), rng.choice(inks)
        for k in range(4):
            _stamp(image, names[1 if k == odd else 0], 66, ink, 7 + 80 * (k % 2), 7 + 80 * (k // 2))
        turns = [
            Turn("Which one is different? Answer briefly.", _PLACES[odd]),
            multiple_choice(rng, "Where is the odd one out?", _PLACES[odd], _PLACES),
            Turn("How many icons are there? Answer briefly.", "4"),
        ]
    else:  # two to four different icons
        count = rng.randint(2, 4)
        chosen = rng.sample(icons, count)
        cells_k = sorted(rng.sample(range(4), count))
        shades = [rng.choice(inks) for _ in chosen]
        for k, icon, ink in zip(cells_k, chosen, shades, strict=True):
            _stamp(image, icon.name, 68, ink, 6 + 80 * (k % 2), 6 + 80 * (k // 2))
        pick = rng.randrange(count)
        k, icon = cells_k[pick], chosen[pick]
        left, top = 6 + 80 * (k % 2), 6 + 80 * (k // 2)
        turns = [
            Turn(
                "List what you see.", ", ".join(f"{i.noun} {_PLACES[c]}" for c, i in zip(cells_k, chosen, strict=True))
            ),
            Turn(f"What is at the {_PLACES[k]}? Answer briefly.", icon.noun),
            Turn(f"What color is the icon at the {_PLACES[k]}? Answer briefly.", shades[pick]),
            multiple_choice(rng, f"What is at the {_PLACES[k]}?", icon.noun, [i.noun for i in icons]),
            Turn("How many icons are there? Answer briefly.", str(count)),
        ]
        if [i.noun for i in chosen].count(icon.noun) == 1:
            turns.append(
                Turn(f"Give the box of the {icon.noun} as x1 y1 x2 y2.", box_text(left, top, left + 68, top + 68))
            )
            turns.append(multiple_choice(rng, f"Where is the {icon.noun}?", _PLACES[k], _PLACES))
    rng.shuffle(turns)
    return Scene(image, tuple(turns[:5]))
