# SPDX-License-Identifier: Apache-2.0
"""Icons with a phrase for a name: 1,651 of Lucide (ISC) and 1,953 of Bootstrap Icons (MIT), read where pip put them.

An icon's file name is a sentence of a small language: "cloud-rain-heavy-fill", "circle-arrow-down", "file-earmark-x".
`phrase` translates it: a noun (the base shape), what is added to it, and whether it is drawn solid,

    "cloud-rain-fill" -> solid cloud with rain          "bell-slash"        -> crossed out bell
    "circle-arrow-up" -> circle with an up arrow        "file-earmark-x"    -> file with a cross

Only icons whose every word is in the tables below are kept, and only words that at least `MIN_ICONS` kept icons share:
a caption of an unseen icon can then be put together from words that were learnt on other icons.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections import Counter
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Final

import resvg_py
from PIL import Image

from mini_cmit.tasks.building import part_of, pool_of, rgb
from mini_cmit.tasks.sources import package_file

MIN_ICONS: Final = 8
# Names that say something else than their words: Bootstrap's "phone" is a mobile while Lucide's is a receiver, and its
# "box-arrow-up" is a square without a lid.
MISLEADING: Final = ("bootstrap/phone", "bootstrap/box-arrow")

# File-name beginning -> noun. The longest beginning wins ("chat-left" before "chat").
NOUNS: Final = {
    "archive": "box",
    "arrow-big-down": "arrow pointing down",
    "arrow-big-left": "arrow pointing left",
    "arrow-big-right": "arrow pointing right",
    "arrow-big-up": "arrow pointing up",
    "arrow-down": "arrow pointing down",
    "arrow-down-short": "arrow pointing down",
    "arrow-left": "arrow pointing left",
    "arrow-left-short": "arrow pointing left",
    "arrow-right": "arrow pointing right",
    "arrow-right-short": "arrow pointing right",
    "arrow-up": "arrow pointing up",
    "arrow-up-short": "arrow pointing up",
    "badge": "badge",
    "bag": "bag",
    "battery": "battery",
    "bell": "bell",
    "book": "book",
    "bookmark": "bookmark",
    "briefcase": "briefcase",
    "building": "building",
    "calendar": "calendar",
    "calendar2": "calendar",
    "calendar3": "calendar",
    "calendar4": "calendar",
    "camera": "camera",
    "car": "car",
    "car-front": "car",
    "caret-down": "arrow pointing down",
    "caret-left": "arrow pointing left",
    "caret-right": "arrow pointing right",
    "caret-up": "arrow pointing up",
    "cart": "cart",
    "chat": "speech bubble",
    "chat-left": "speech bubble",
    "chat-right": "speech bubble",
    "chat-square": "speech bubble",
    "chevron-down": "arrow pointing down",
    "chevron-left": "arrow pointing left",
    "chevron-right": "arrow pointing right",
    "chevron-up": "arrow pointing up",
    "circle": "circle",
    "clipboard": "clipboard",
    "clipboard2": "clipboard",
    "clock": "clock",
    "cloud": "cloud",
    "cup": "cup",
    "cup-hot": "cup",
    "database": "database",
    "diamond": "diamond",
    "droplet": "droplet",
    "envelope": "envelope",
    "envelope-open": "open envelope",
    "envelope-paper": "open envelope",
    "eye": "eye",
    "file": "file",
    "file-earmark": "file",
    "flag": "flag",
    "folder": "folder",
    "gear": "gear",
    "gift": "gift",
    "globe": "globe",
    "heart": "heart",
    "hexagon": "hexagon",
    "house": "house",
    "house-door": "house",
    "image": "picture",
    "journal": "book",
    "key": "key",
    "lightbulb": "light bulb",
    "lock": "padlock",
    "mail": "envelope",
    "mail-open": "open envelope",
    "map-pin": "map pin",
    "geo-alt": "map pin",
    "message-circle": "speech bubble",
    "message-square": "speech bubble",
    "mic": "microphone",
    "monitor": "monitor",
    "moon": "moon",
    "octagon": "octagon",
    "package": "box",
    "box": "box",
    "patch": "badge",
    "pen": "pencil",
    "pencil": "pencil",
    "person": "person",
    "phone": "phone",
    "telephone": "phone",
    "search": "magnifying glass",
    "send": "paper plane",
    "settings": "gear",
    "shield": "shield",
    "shopping-bag": "bag",
    "shopping-cart": "cart",
    "square": "square",
    "star": "star",
    "sun": "sun",
    "terminal": "terminal",
    "ticket": "ticket",
    "trash": "trash can",
    "trash-2": "trash can",
    "trash3": "trash can",
    "triangle": "triangle",
    "truck": "truck",
    "user": "person",
    "user-round": "person",
    "window": "window",
    "app-window": "window",
}

# What may follow the noun -> what it adds. "" adds nothing worth a word; "crossed out" becomes an adjective.
ADDITIONS: Final = {
    "": "",
    "add": "a plus sign",
    "alert": "an exclamation mark",
    "arrow-down": "a down arrow",
    "arrow-left": "a left arrow",
    "arrow-right": "a right arrow",
    "arrow-up": "an up arrow",
    "check": "a check mark",
    "check-2": "a check mark",
    "check-big": "a check mark",
    "check-corner": "a check mark",
    "check-inside": "a check mark",
    "check-line": "a check mark",
    "chevron-down": "a down arrow",
    "chevron-left": "a left arrow",
    "chevron-right": "a right arrow",
    "chevron-up": "an up arrow",
    "clock": "a clock",
    "code": "code brackets",
    "code-corner": "code brackets",
    "cog": "a gear",
    "dash": "a minus sign",
    "dots": "three dots",
    "down": "a down arrow",
    "download": "a down arrow",
    "drizzle": "rain",
    "ellipsis": "three dots",
    "exclamation": "an exclamation mark",
    "exclamation-point": "an exclamation mark",
    "gear": "a gear",
    "hail": "rain",
    "heart": "a heart",
    "image": "a picture",
    "lightning": "a lightning bolt",
    "lightning-rain": "rain",
    "lock": "a padlock",
    "lock2": "a padlock",
    "minus": "a minus sign",
    "minus-2": "a minus sign",
    "minus-corner": "a minus sign",
    "minus-inside": "a minus sign",
    "more": "three dots",
    "moon": "a moon",
    "moon-rain": "rain",
    "music": "a music note",
    "off": "crossed out",
    "open": "",
    "pen": "a pencil",
    "pen-line": "a pencil",
    "person": "a person",
    "play": "a play sign",
    "plus": "a plus sign",
    "plus-2": "a plus sign",
    "plus-corner": "a plus sign",
    "plus-inside": "a plus sign",
    "question": "a question mark",
    "question-mark": "a question mark",
    "rain": "rain",
    "rain-heavy": "rain",
    "rain-wind": "rain",
    "search": "a magnifying glass",
    "search-corner": "a magnifying glass",
    "slash": "crossed out",
    "sleet": "rain",
    "snow": "snow",
    "star": "a star",
    "sun": "a sun",
    "sun-rain": "rain",
    "text": "lines of text",
    "up": "an up arrow",
    "up-2": "an up arrow",
    "upload": "an up arrow",
    "user": "a person",
    "user-round": "a person",
    "warning": "an exclamation mark",
    "x": "a cross",
    "x-2": "a cross",
    "x-corner": "a cross",
    "x-inside": "a cross",
}

# Drawn alike to the pixel although their paths differ in a last digit; a test renders all icons to find such pairs.
DRAWN_ALIKE: Final = {
    "bootstrap/sun": "bootstrap/brightness-high",
    "bootstrap/sun-fill": "bootstrap/brightness-high-fill",
}

CONTAINERS: Final = ("circle", "square", "octagon", "diamond", "triangle")
# In Bootstrap's names the sign comes first: "arrow-up-circle", "x-octagon", "check-square".
_SIGN_FIRST: Final = re.compile(rf"^(?P<sign>.+)-(?P<container>{'|'.join(CONTAINERS)})$")


@dataclass(frozen=True, kw_only=True)
class Icon:
    """One icon: its entity name ("lucide/cloud-rain"), its phrase without article and its drawing.

    `noun` is the base shape ("cloud"), `addition` what is added to it ("rain", "crossed out" or ""), `solid` whether it
    is drawn filled.
    """

    name: str
    phrase: str
    noun: str
    addition: str
    solid: bool
    pool: str
    svg: str


@dataclass(frozen=True)
class Meaning:
    noun: str
    addition: str
    solid: bool

    @property
    def phrase(self) -> str:
        if self.addition == "crossed out":
            text = f"crossed out {self.noun}"
        elif self.addition:
            text = f"{self.noun} with {self.addition}"
        else:
            text = self.noun
        return f"solid {text}" if self.solid else text

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(part for part in (self.noun, self.addition) if part)


def meaning_of(file_name: str) -> Meaning | None:
    """The meaning of an icon's file name, or None where a part of it is in neither table."""
    parts = file_name.split("-")
    solid = "fill" in parts
    bare = "-".join(part for part in parts if part != "fill")
    sign_first = _SIGN_FIRST.match(bare)
    if sign_first and sign_first["sign"] in ADDITIONS:
        return Meaning(sign_first["container"], ADDITIONS[sign_first["sign"]], solid)
    for cut in range(len(bare), 0, -1):
        noun = NOUNS.get(bare[:cut])
        if noun is not None and (cut == len(bare) or bare[cut] == "-"):
            addition = ADDITIONS.get(bare[cut + 1 :])
            return None if addition is None else Meaning(noun, addition, solid)
    return None


def with_article(phrase: str) -> str:
    """ "open envelope" -> "an open envelope"."""
    return f"an {phrase}" if phrase[0] in "aeio" else f"a {phrase}"


@cache
def _drawings() -> dict[str, str]:
    """Every icon of both packages, {entity name: svg text}, in sorted order."""
    drawings: dict[str, str] = {}
    with zipfile.ZipFile(package_file("lucide", "lucide.zip")) as archive:
        for member in archive.namelist():
            if member.endswith(".svg"):
                drawings[f"lucide/{member[:-4]}"] = archive.read(member).decode("utf-8")
    sprite = package_file("bootstrap_icons", "install", "bootstrap-icons.svg")
    symbol = re.compile(r'<symbol class="[^"]*" viewBox="([^"]+)" id="([^"]+)">(.*?)</symbol>', re.DOTALL)
    for box, name, body in symbol.findall(sprite.read_text(encoding="utf-8")):
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" fill="currentColor">'
        drawings[f"bootstrap/{name}"] = f"{head}{body}</svg>"
    return dict(sorted(drawings.items()))


def _file_name(entity: str) -> str:
    return entity.split("/", 1)[1]


@cache
def _keys() -> dict[str, str]:
    """{entity name: name that decides its pool}: two names of one drawing (both packages keep some) have one key."""
    first_name: dict[str, str] = {}
    keys = {entity: first_name.setdefault(re.sub(r"\s+", "", svg), entity) for entity, svg in _drawings().items()}
    return {entity: DRAWN_ALIKE.get(entity, key) for entity, key in keys.items()}


def part_of_icon(entity: str) -> str:
    """The task that may show the icon: "captions" (two thirds) or "questions" (a third), whatever its pool."""
    return "questions" if part_of(_keys()[entity], "icon task", 3) == 2 else "captions"


def drawings_in_pool(pool: str) -> tuple[str, ...]:
    """The names of all icons of one pool, with or without a phrase, sorted: for tasks that only compare drawings."""
    return tuple(entity for entity in _drawings() if pool_of(_keys()[entity]) == pool)


@cache
def all_icons() -> tuple[Icon, ...]:
    """The icons that have a phrase, in the order of their names."""
    kept: dict[str, Meaning] = {}
    for entity in _drawings():
        meaning = meaning_of(_file_name(entity))
        if meaning is not None and not entity.startswith(MISLEADING):
            kept[entity] = meaning
    while True:
        counts = Counter(word for meaning in kept.values() for word in meaning.words)
        rare = [entity for entity, meaning in kept.items() if min(counts[word] for word in meaning.words) < MIN_ICONS]
        if not rare:
            break
        for entity in rare:
            del kept[entity]
    return tuple(
        Icon(
            name=entity,
            phrase=meaning.phrase,
            noun=meaning.noun,
            addition=meaning.addition,
            solid=meaning.solid,
            pool=pool_of(_keys()[entity]),
            svg=_drawings()[entity],
        )
        for entity, meaning in kept.items()
    )


def icons_in_pool(pool: str) -> tuple[Icon, ...]:
    """The icons of one pool ("pretraining", "train", "validation" or "test"), in the order of their names."""
    return tuple(icon for icon in all_icons() if icon.pool == pool)


@lru_cache(maxsize=4096)
def _ink(name: str, size: int) -> Image.Image:
    svg = _drawings().get(name)
    if svg is None:
        raise ValueError(f"icon name is {name!r}; expected one of Icon.name, such as 'lucide/cloud-rain'.")
    # Drawn in black and used as a mask only: one rendering serves every colour.
    png = resvg_py.svg_to_bytes(
        svg_string=svg.replace("currentColor", "#000000"), width=size, height=size, skip_system_fonts=True
    )
    drawn = Image.open(io.BytesIO(png)).convert("RGBA")
    if drawn.size != (size, size):
        square = Image.new("RGBA", (size, size), (0, 0, 0, 0))
        square.paste(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
        drawn = square
    return drawn.getchannel("A")


def icon_image(name: str, size: int, colour: str) -> Image.Image:
    """The icon `name` (Icon.name) as a `size` x `size` RGBA layer in one colour of `building.COLOURS` or "#rrggbb"."""
    layer = Image.new("RGBA", (size, size), (*rgb(colour), 0))
    layer.putalpha(_ink(name, size))
    return layer
