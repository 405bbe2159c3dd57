# SPDX-License-Identifier: Apache-2.0
"""Coloured shapes: what, which colour, where, how many, how large, which differs; boxes."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from mini_cmit.pretraining.scene import COLOURS, SIDE, Scene, Turn, background, box_text, jittered, multiple_choice

SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "diamond",
    "cross",
    "ring",
    "hexagon",
    "pentagon",
    "half circle",
    "bar",
)
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class _Item:
    shape: str
    colour: str
    box: tuple[float, float, float, float]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        x, y = (self.box[0] + self.box[2]) / 2 / SIDE, (self.box[1] + self.box[3]) / 2 / SIDE
        column = "left" if x < 0.4 else "right" if x > 0.6 else "center"
        row = "top" if y < 0.4 else "bottom" if y > 0.6 else "middle"
        if row == "middle":
            return column
        return row if column == "center" else f"{row} {column}"


def _polygon(sides: int, cx: float, cy: float, r: float, turn: float, inner: float = 1.0) -> list[tuple[float, float]]:
    points = sides if inner == 1.0 else 2 * sides
    return [
        (
            cx + (r if i % 2 == 0 else r * inner) * math.sin(turn + 2 * math.pi * i / points),
            cy - (r if i % 2 == 0 else r * inner) * math.cos(turn + 2 * math.pi * i / points),
        )
        for i in range(points)
    ]


def _draw(
    draw: ImageDraw.ImageDraw,
    shape: str,
    fill: tuple[int, int, int],
    cx: float,
    cy: float,
    r: float,
    rng: random.Random,
) -> tuple[float, float, float, float]:
    """Draws the shape; returns its bounding box."""
    box = (cx - r, cy - r, cx + r, cy + r)
    if shape == "circle":
        draw.ellipse(box, fill=fill)
        return box
    if shape == "ring":
        draw.ellipse(box, outline=fill, width=max(3, int(r * 0.3)))
        return box
    if shape == "half circle":
        draw.pieslice(box, 180, 360, fill=fill)
        return (cx - r, cy - r, cx + r, cy)
    if shape == "bar":
        box = (cx - r, cy - r * 0.3, cx + r, cy + r * 0.3)
        draw.rectangle(box, fill=fill)
        return box
    if shape == "square":
        draw.rectangle(box, fill=fill)
        return box
    if shape == "cross":
        draw.rectangle((cx - r, cy - r * 0.3, cx + r, cy + r * 0.3), fill=fill)
        draw.rectangle((cx - r * 0.3, cy - r, cx + r * 0.3, cy + r), fill=fill)
        return box
    tilt = rng.uniform(-0.15, 0.15)
    points = {
        "triangle": lambda: _polygon(3, cx, cy, r, tilt),
        "diamond": lambda: [(cx, cy - r), (cx + r * 0.7, cy), (cx, cy + r), (cx - r * 0.7, cy)],
        "pentagon": lambda: _polygon(5, cx, cy, r, tilt),
        "hexagon": lambda: _polygon(6, cx, cy, r, tilt),
        "star": lambda: _polygon(5, cx, cy, r, tilt, 0.42),
    }[shape]()
    draw.polygon(points, fill=fill)
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    return (min(xs), min(ys), max(xs), max(ys))


def _place(
    rng: random.Random, count: int, same_shape: str | None, same_colour: str | None
) -> tuple[Image.Image, str, list[_Item]]:
    ground, ground_rgb = background(rng)
    image = Image.new("RGB", (SIDE, SIDE), ground_rgb)
    draw = ImageDraw.Draw(image)
    grid = 1 if count == 1 else 2 if count <= 4 and rng.random() < 0.7 else 3
    cells = rng.sample([(i, j) for i in range(grid) for j in range(grid)], count)
    colours = [c for c in COLOURS if c != ground]
    items = []
    for i, j in cells:
        cell = SIDE / grid
        r = cell * rng.uniform(0.22 if grid == 1 else 0.3, 0.45)
        cx = (i + 0.5) * cell + rng.uniform(-1, 1) * (cell / 2 - r) * 0.9
        cy = (j + 0.5) * cell + rng.uniform(-1, 1) * (cell / 2 - r) * 0.9
        shape = same_shape or rng.choice(SHAPES)
        colour = same_colour if same_colour and same_colour != ground else rng.choice(colours)
        items.append(_Item(shape, colour, _draw(draw, shape, jittered(rng, colour), cx, cy, r, rng)))
    return image, ground, items


def shapes_scene(rng: random.Random) -> Scene:
    """One to six shapes of any kind and colour, with four or five turns."""
    count = rng.choices((1, 2, 3, 4, 5, 6), (4, 5, 4, 3, 1, 1))[0]
    same = rng.random()
    image, ground, items = _place(
        rng, count, rng.choice(SHAPES) if same < 0.2 else None, rng.choice(list(COLOURS)) if 0.2 <= same < 0.4 else None
    )
    items.sort(key=lambda item: (round(item.box[1] / 50), item.box[0]))
    names = [item.name for item in items]
    turns = [
        Turn("List what you see.", ", ".join(f"{item.name} {item.place}" for item in items) + f", {ground} background")
    ]
    turns.append(Turn("How many shapes are there? Answer briefly.", str(count)))
    turns.append(multiple_choice(rng, "How many shapes are there?", str(count), [str(n) for n in range(1, 8)]))
    unique = [item for item in items if names.count(item.name) == 1]
    if unique:
        item = rng.choice(unique)
        turns.append(Turn(f"Give the box of the {item.name} as x1 y1 x2 y2.", box_text(*item.box)))
        turns.append(Turn(f"Where is the {item.name}? Answer briefly.", item.place))
    shape_of = rng.choice(items)
    if sum(item.shape == shape_of.shape for item in items) == 1:
        turns.append(Turn(f"What color is the {shape_of.shape}? Answer briefly.", shape_of.colour))
        turns.append(multiple_choice(rng, f"What color is the {shape_of.shape}?", shape_of.colour, list(COLOURS)))
        label = rng.choice(
            ("Alma", "Bor", "Cora", "Dell", "Elm", "Fargo", "Gale", "Hill", "Iona", "Jura", "Kent", "Lee")
        )
        if sum(item.colour == shape_of.colour for item in items) == 1:
            turns.append(
                Turn(f"{label} is the {shape_of.colour} one. What shape is {label}? Answer briefly.", shape_of.shape)
            )
    if sum(item.colour == shape_of.colour for item in items) == 1:
        turns.append(multiple_choice(rng, f"Which shape is {shape_of.colour}?", shape_of.shape, list(SHAPES)))
    present = rng.choice(items).name
    absent = f"{rng.choice(list(COLOURS))} {rng.choice(SHAPES)}"
    asked = present if rng.random() < 0.5 else absent
    turns.append(Turn(f"Is there a {asked}? Answer briefly.", "yes" if asked in names else "no"))
    number = _NUMBERS[sum(item.colour == shape_of.colour for item in items)]
    turns.append(Turn(f"Count the {shape_of.colour} shapes in words.", number))
    first, rest = turns[0], turns[1:]
    rng.shuffle(rest)
    return Scene(image, tuple([first, *rest][:6] if rng.random() < 0.5 else [*rest[:4], first]))


def odd_one_scene(rng: random.Random) -> Scene:
    """Four shapes in a 2 x 2 grid, one unlike the others in shape or colour; which, and where."""
    ground, ground_rgb = background(rng)
    image = Image.new("RGB", (SIDE, SIDE), ground_rgb)
    draw = ImageDraw.Draw(image)
    shapes = rng.sample(SHAPES, 2)
    colours = rng.sample([c for c in COLOURS if c != ground], 2)
    by_colour = rng.random() < 0.4
    odd = rng.randrange(4)
    places = ("top left", "top right", "bottom left", "bottom right")
    for i in range(4):
        shape = shapes[1] if i == odd and not by_colour else shapes[0]
        colour = colours[1] if i == odd and by_colour else colours[0]
        _draw(draw, shape, jittered(rng, colour), 40 + 80 * (i % 2), 40 + 80 * (i // 2), rng.uniform(22, 34), rng)
    turns = [
        Turn("Which one is different? Answer briefly.", places[odd]),
        multiple_choice(rng, "Where is the odd one out?", places[odd], places),
        multiple_choice(
            rng, "Which shape is at the " + places[odd] + "?", shapes[0] if by_colour else shapes[1], list(SHAPES)
        ),
        Turn("How do the others look? Answer briefly.", f"{colours[0]} {shapes[0]}"),
    ]
    rng.shuffle(turns)
    return Scene(image, tuple(turns))
