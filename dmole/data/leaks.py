# SPDX-License-Identifier: Apache-2.0
"""What test rows share with rows that are trained on: entities, images, and whole questions.

    entity             in a test split and in a train or validation split, of the same task or of another
    image              the same bytes (SHA-256 of the file) in such splits
    question + images  the same instruction on the same images in two splits or in two tasks

An image that was saved anew, cropped or scaled is not found: its bytes differ. Cost: every image file is read once
more; memory grows with the distinct entities, images and questions (about 200 bytes each).
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from dmole.data.sample import Sample


class LeakFinder:
    """Is shown every row of a stream by `add`; `found` has one line for each thing shared and pair of splits."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._digests: dict[Path, str] = {}
        # What was met: in which (task, split), and where first.
        self._met: dict[tuple[str, bytes], dict[tuple[str, str], str]] = {}

    def add(self, task: str, split: str, place: str, sample: Sample) -> None:
        """`place`: "file:line", for the findings."""
        for kind, shown, key in self._keys(sample):
            places = self._met.setdefault((kind, key), {})
            if (task, split) in places:
                continue
            for (other_task, other_split), other in places.items():
                tested = (split == "test") != (other_split == "test")
                if tested or (kind == "question" and (task != other_task or split != other_split)):
                    self.found.append(f"{place}: {shown} is also in {other}")
            places[task, split] = place

    def lines(self, most: int | None) -> list[str]:
        """One line that says what was looked for and found, then the first `most` findings, or all."""
        count = f"{len(self.found)} found" if self.found else "none"
        shown = self.found[:most]
        rest = [f"... and {len(self.found) - len(shown)} more (--all shows them)"] if shown != self.found else []
        head = f"leaks (entities, image bytes, question with images, across splits and tasks): {count}"
        return [head, *(f"leak: {text}" for text in shown), *rest]

    def _keys(self, sample: Sample) -> Iterator[tuple[str, str, bytes]]:
        for entity in dict.fromkeys(sample.entities):
            yield "entity", f"entity {entity!r}", _key(entity)
        digests = [self._digest(path) for path in sample.images]
        for path, digest in dict(zip(sample.images, digests, strict=True)).items():
            yield "image", f"image {path.name}", digest.encode()
        yield (
            "question",
            f"the question of {sample.id!r} with its images",
            _key("\0".join([sample.instruction, *digests])),
        )

    def _digest(self, path: Path) -> str:
        if path not in self._digests:
            # A missing file is a finding of the reader.
            content = path.read_bytes() if path.is_file() else str(path).encode()
            self._digests[path] = hashlib.sha256(content).hexdigest()[:32]
        return self._digests[path]


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]
