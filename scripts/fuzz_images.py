# SPDX-License-Identifier: Apache-2.0
"""Damaged pictures of every format that Pillow writes, through the one way to pixels (`dmole.data.images`).

    python scripts/fuzz_images.py --pictures 5000 --output results/fuzz_images.json

Bits flip, files end early, headers and sizes change, blocks move. A picture must end as RGB pixels or an `ImageError`,
the same from `inspect_image` and `open_image`, in SECONDS and in MEMORY: worker processes have that limit, and one that
dies or hangs is counted by the picture it was given. Exit status 1 if any picture ended otherwise.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import io
import json
import multiprocessing
import platform
import random
import re
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from PIL import Image, features

from dmole.data.images import ImageError, inspect_image, open_image

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 20.0
MEMORY = 2**30  # bytes that a worker may take beyond what it has after its imports
PIXELS = 2**22  # `Image.MAX_IMAGE_PIXELS` of the workers, so that the limit of memory means something
MODES = ("RGB", "RGBA", "P", "L", "LA", "1", "I;16", "I", "F", "CMYK", "YCbCr", "LAB")
EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@functools.cache
def originals() -> dict[str, list[bytes]]:
    """{format: whole files, in every mode that the format holds and that can be read again; one animated}."""
    Image.init()
    found: dict[str, list[bytes]] = {}
    base = Image.effect_mandelbrot((40, 28), (-2, -1.5, 1, 1.5), 20).convert("RGB")
    for form in sorted(Image.SAVE):
        for mode in MODES:
            image = base.convert("I").convert(mode) if mode == "I;16" else _as(base, mode)
            for options in ({}, {"save_all": True, "append_images": [image.rotate(180)]}):
                if options and (form not in Image.SAVE_ALL or mode not in ("RGB", "P")):
                    continue
                buffer = io.BytesIO()
                try:
                    image.save(buffer, form, **options)
                    Image.open(io.BytesIO(buffer.getvalue()))
                # A format that does not hold this mode says so in its own way; one that only writes cannot be read.
                except Exception:
                    continue
                found.setdefault(form, []).append(buffer.getvalue())
    return found


def _as(image: Image.Image, mode: str) -> Image.Image:
    if mode == "LAB":
        return Image.merge("LAB", image.split())
    return image.convert(mode)


def bit_flips(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 2, 8, 64))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def truncation(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def header_edit(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.randrange(1, 6)):
        data[chance.randrange(min(len(data), 96))] = chance.randrange(256)


def size_edit(data: bytearray, chance: random.Random) -> None:
    """A number of a width that headers use is replaced by an extreme one."""
    width, order = chance.choice((2, 4)), chance.choice(("little", "big"))
    place = chance.randrange(max(1, min(len(data), chance.choice((64, len(data)))) - width))
    value = chance.choice(EDGES) % 256**width
    data[place : place + width] = value.to_bytes(width, order)  # type: ignore[arg-type]


def block_move(data: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(data))
    block = bytes(data[start : start + chance.randrange(1, 200)])
    if chance.random() < 0.5:
        del data[start : start + len(block)]
    place = chance.randrange(len(data) + 1)
    data[place:place] = block * chance.choice((1, 1, 3))


MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    bit_flips, truncation, header_edit, size_edit, block_move,
)  # fmt: skip


def mutated(number: int, seed: int) -> tuple[str, str, bytes]:
    """(format, mutation, content) of picture `number`; formats and mutations take turns."""
    every = originals()
    chance = random.Random(f"{seed}/{number}")
    form = list(every)[number % len(every)]
    mutate = MUTATIONS[number // len(every) % len(MUTATIONS)]
    data = bytearray(chance.choice(every[form]))
    mutate(data, chance)
    return form, mutate.__name__, bytes(data)


def outcome(content: bytes) -> str:
    """ "opened", "finding: ERROR"; "wrong: ..." for everything that must not be."""
    try:
        with warnings.catch_warnings():
            # As the reader of streams has them.
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            report = inspect_image(content)
            try:
                image = open_image(content)
            except ImageError as error:
                named = re.fullmatch(
                    r"image of \d+ bytes (cannot be decoded \((\w+): .*\); replace the file|is too large .*; scale it "
                    r"down|is a drawing .*; save it as PNG|holds .*|has no pixels; .*)",
                    str(error),
                )
                if report.complaint is None or named is None:
                    return f"wrong: {report} and {error}"
                return f"finding: {named[2] or ' '.join(named[1].split()[:3])}"
    except BaseException as error:
        return f"wrong: {type(error).__name__}: {error}"
    if report.complaint is not None:
        # What only an inspection reads: checksums after the pixels, frames after the first.
        return "finding: by inspection alone"
    if image.mode != "RGB" or image.size != report.size:
        return f"wrong: {image.mode} {image.size}, inspected as {report.size}"
    return "opened"


def _work(pipe: Connection, seed: int) -> None:
    Image.MAX_IMAGE_PIXELS = PIXELS
    originals()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while True:
        number = pipe.recv()
        if number is None:
            return
        result = outcome(mutated(number, seed)[2])
        pipe.send((result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start))


class _Worker:
    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, self._seed), daemon=True)
        self._process.start()
        other.close()

    def outcome(self, number: int) -> tuple[str, int]:
        """The outcome of a picture and the KiB that the worker has grown by so far."""
        self._pipe.send(number)
        try:
            if self._pipe.poll(SECONDS):
                result: tuple[str, int] = self._pipe.recv()
                return result
            found = f"wrong: no answer in {SECONDS:g} seconds"
        except EOFError:
            found = "wrong: the process ended"
        self._process.kill()
        self._process.join()
        self._start()
        return found, 0


def fuzz(pictures: int, seed: int) -> dict[str, Any]:
    """The record of a run."""
    worker = _Worker(seed)
    by_format: dict[str, collections.Counter[str]] = {form: collections.Counter() for form in originals()}
    by_mutation: dict[str, int] = collections.Counter()
    wrong: list[dict[str, Any]] = []
    grown = 0
    for number in range(pictures):
        form, mutation, _ = mutated(number, seed)
        result, size = worker.outcome(number)
        grown = max(grown, size)
        by_mutation[mutation] += 1
        by_format[form][result.split(":")[0] if result.startswith("wrong") else result] += 1
        if result.startswith("wrong"):
            wrong.append({"number": number, "format": form, "mutation": mutation, "outcome": result})
            print(wrong[-1], file=sys.stderr, flush=True)
    total: collections.Counter[str] = sum(by_format.values(), collections.Counter())
    return {
        "pictures": pictures,
        "seed": seed,
        "outcomes": dict(sorted(total.items())),
        "formats": {form: dict(sorted(found.items())) for form, found in by_format.items()},
        "mutations": dict(by_mutation),
        "wrong": wrong,
        "seconds_allowed": SECONDS,
        "memory_allowed_mib": MEMORY // 2**20,
        "memory_grown_mib": grown // 2**10,
    }


def about() -> dict[str, Any]:
    git = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    libraries = {name: features.version(name) for name in sorted(features.get_supported())}
    return {
        "commit": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), **{k: v for k, v in libraries.items() if v}},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    record = {**fuzz(options.pictures, options.seed), **about()}
    print(json.dumps({"outcomes": record["outcomes"], "memory_grown_mib": record["memory_grown_mib"]}, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 1 if record["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
