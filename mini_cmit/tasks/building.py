# SPDX-License-Identifier: Apache-2.0
"""What every task of the mini benchmark is built with: pools, seeds, instructions, colours and rows.

An *entity* is what a sample is about (one icon, one county, one film title, one handwritten digit). Its pool is a
function of its name alone,

    pool_of(entity) = first pool whose cumulated share exceeds  sha256(entity) mod 100

so no seed, sample count or build order can move an entity from one split to another. The pool "pretraining" belongs to
no task: the base model is pretrained on those entities, and the tasks never show them.

Samples are seeded one by one, `rng(task, split, index)`: the first 500 rows of a build of 1,500 are the build of 500.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageColor

PRETRAINING: Final = "pretraining"
SPLITS: Final = ("train", "validation", "test")
# Percent. Test and validation are small because a task needs 100 to 200 samples there, and entities may recur in a
# split; pretraining is as large as train because the base model has to meet the breadth of the material.
POOL_SHARES: Final = ((PRETRAINING, 40), ("train", 40), ("validation", 8), ("test", 12))

CAPTION_INSTRUCTION: Final = "Describe the image in one sentence."
LETTERS: Final = "ABCDEFGH"

# Far apart in hue or lightness, so that a frozen ImageNet stem can tell them apart on a 32 px cell.
COLOURS: Final = {
    "red": "#d62020",
    "orange": "#ff8c1a",
    "yellow": "#ffe11a",
    "green": "#1e9e3c",
    "blue": "#1f4fd8",
    "purple": "#7d26a8",
    "pink": "#ff8fc0",
    "brown": "#7a4a21",
    "gray": "#8c8c8c",
    "black": "#101010",
    "white": "#fafafa",
}


def _number(*parts: object) -> int:
    """A 64-bit number made of the parts' text; `hash()` would change with PYTHONHASHSEED."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def pool_of(entity: str) -> str:
    """The pool of an entity: "pretraining" (40 %), "train" (40 %), "validation" (8 %) or "test" (12 %)."""
    point = _number("pool", entity) % 100
    for pool, share in POOL_SHARES:
        if point < share:
            return pool
        point -= share
    raise AssertionError("the pool shares add up to 100")


def part_of(entity: str, purpose: str, parts: int) -> int:
    """Cuts the entities into `parts` halves, thirds ...: two tasks of one material take different parts."""
    return _number("part", purpose, entity) % parts


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a split's jsonl; `answers[0]` is the training target, all are references at test."""

    id: str
    image: str
    instruction: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    entities: tuple[str, ...] = ()

    def as_json(self) -> dict[str, object]:
        fields: dict[str, object] = {
            "id": self.id,
            "image": self.image,
            "instruction": self.instruction,
            "answers": list(self.answers),
        }
        if self.options:
            fields["options"] = list(self.options)
        if self.entities:
            fields["entities"] = list(self.entities)
        return fields


@dataclass(frozen=True, kw_only=True)
class TaskRows:
    """What a task file's `build` returns: its name, its metric and the rows of its three splits."""

    name: str
    metric: str
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]

    def split(self, split: str) -> tuple[Row, ...]:
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]


@dataclass(frozen=True, kw_only=True)
class BuildContext:
    """Where and how large to build. `root` is the stream's folder; a task writes below `root / name`."""

    root: Path
    seed: int
    image_side: int
    train: int
    validation: int
    test: int

    def count(self, split: str) -> int:
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]

    def rng(self, task: str, split: str, index: int) -> random.Random:
        """The random numbers of one sample; nothing but (seed, task, split, index) decides them."""
        return random.Random(_number("sample", self.seed, task, split, index))

    def row(
        self,
        task: str,
        split: str,
        index: int,
        image: Image.Image,
        *,
        instruction: str,
        answers: Sequence[str],
        options: Sequence[str] = (),
        entities: Iterable[str] = (),
    ) -> Row:
        """Writes the image as PNG and returns the row that names it."""
        relative = f"images/{split}-{index:05d}.png"
        path = self.root / task / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        if image.size != (self.image_side, self.image_side):
            raise ValueError(
                f"image of {task} {split} {index} has size {image.size}; expected a square of side {self.image_side}. "
                "Draw it with the context's image_side."
            )
        image.convert("RGB").save(path, format="PNG", compress_level=6)
        return Row(
            id=f"{task}-{split}-{index:05d}",
            image=relative,
            instruction=instruction,
            answers=tuple(answers),
            options=tuple(options),
            entities=tuple(sorted(entities)),
        )


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One sample before it has a place in a split: what a task's `draw(rng, pool, side)` returns.

    `draw` works on every pool, so the base model can be pretrained on the same forms and other entities.
    """

    image: Image.Image
    instruction: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    entities: tuple[str, ...] = ()


def build_task(
    context: BuildContext, name: str, metric: str, draw: Callable[[random.Random, str, int], Drawn]
) -> TaskRows:
    """The rows of a task whose samples are drawn one by one; a split draws from the pool of the same name."""
    splits: dict[str, tuple[Row, ...]] = {}
    for split in SPLITS:
        rows: list[Row] = []
        for index in range(context.count(split)):
            drawn = draw(context.rng(name, split, index), split, context.image_side)
            rows.append(
                context.row(
                    name,
                    split,
                    index,
                    drawn.image,
                    instruction=drawn.instruction,
                    answers=drawn.answers,
                    options=drawn.options,
                    entities=drawn.entities,
                )
            )
        splits[split] = tuple(rows)
    return TaskRows(
        name=name, metric=metric, train=splits["train"], validation=splits["validation"], test=splits["test"]
    )


def write_task(context: BuildContext, rows: TaskRows) -> None:
    """Writes `train.jsonl`, `validation.jsonl` and `test.jsonl` of one task."""
    folder = context.root / rows.name
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        lines = [json.dumps(row.as_json(), ensure_ascii=False) for row in rows.split(split)]
        (folder / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def multiple_choice(question: str, options: Sequence[str]) -> str:
    """The instruction of every task that is answered by a letter."""
    lettered = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return f"{question}\n{lettered}\nAnswer with the letter."


def short_answer(question: str) -> str:
    """The instruction of every task that is answered by a word or a number."""
    return f"{question} Answer briefly."


def box_question(what: str) -> str:
    """The instruction of the grounding task."""
    return f"Give the box of {what} as x1 y1 x2 y2."


def rgb(colour: str) -> tuple[int, int, int]:
    """The bytes of a named colour of `COLOURS` (or of any colour PIL knows)."""
    red, green, blue, *_ = ImageColor.getrgb(COLOURS.get(colour, colour))
    return red, green, blue


def lightness(colour: str) -> float:
    """Perceived lightness in 0..1 (ITU-R BT.601 luma)."""
    red, green, blue = rgb(colour)
    return (0.299 * red + 0.587 * green + 0.114 * blue) / 255


def contrasting_pair(rng: random.Random, names: Sequence[str] = tuple(COLOURS), *, gap: float = 0.3) -> tuple[str, str]:
    """(foreground, background), two colour names whose lightness differs by at least `gap`.

    The background is drawn first, evenly: drawn as pairs, white and yellow would lie behind half of the images.
    """
    partners = {back: [ink for ink in names if abs(lightness(ink) - lightness(back)) >= gap] for back in names}
    background = rng.choice([back for back in names if partners[back]])
    return rng.choice(partners[background]), background


def canvas(side: int, colour: str) -> Image.Image:
    return Image.new("RGB", (side, side), rgb(colour))


def textured_canvas(rng: random.Random, side: int, colour: str, *, strength: int = 16) -> Image.Image:
    """A background of one colour that grows lighter in a random direction, so that images seldom share a background.

    A gradient and no grain: with grain the PNG is four times as large (25 kB instead of 6 at 160 px).
    """
    column, row = np.meshgrid(np.linspace(-1, 1, side), np.linspace(-1, 1, side))
    angle = rng.uniform(0, 2 * math.pi)
    slope = strength * (math.cos(angle) * column + math.sin(angle) * row)
    pixels = np.asarray(rgb(colour), dtype=np.float64) + slope[..., None]
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def paste(image: Image.Image, layer: Image.Image, left: int, top: int) -> None:
    """Draws an RGBA layer on the image at (left, top)."""
    image.paste(layer, (left, top), layer)
