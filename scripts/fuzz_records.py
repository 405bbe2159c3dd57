# SPDX-License-Identifier: Apache-2.0
"""Damaged JSONL records, configurations and `--set` strings: each is read, or is a named finding or a ConfigError.

    python scripts/fuzz_records.py --number 20000 --output results/fuzz_records.json

Drawn from sound ones by edits of values (half surrogate pairs, long integers, deep nesting, long names, foreign types)
and of bytes. Any other exception, or SECONDS without an answer, is counted as wrong. Exit status 1 if any was.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from dmole.config import RunConfig, build_config, load_config
from dmole.config_error import ConfigError
from dmole.data import DataError, read_stream

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 20
FINDING = re.compile(r"(train\.jsonl(:\d+)?|a/train\.jsonl(:\d+)?): .+", re.DOTALL)
DEEP: Any = []
for _ in range(300):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 10**9, 10**30, 10**400, -(2**63), 0.5, 1e308, float("inf"), float("nan"), "",
    " ", "a", "no", "on", "1:30", "\ud83d", "\ude00x", "\U0001f600", "\0", "x" * 300, "a/" * 3000,
    "data:image/png;base64,AA", "https://a.b/c.png", "\ufeff", "(a+)+$", "(a|", "a{99999999999}", "../a.png",
    "~", ".", "a.png", "<image>", [], {}, [None], ["a"], ["a", "a"], [1], {"a": 1}, {"": None}, DEEP,
)  # fmt: skip
BYTES = (
    b"\xef\xbb\xbf", b"\0", b"\xff", b"\\ud83d", b"\n", b"\r", b"\xe2\x80\xa8", b"{", b"[" * 2000, b"]", b"}", b'"',
    b",", b":", b"9" * 5000, b"NaN", b"1e999", b"- ", b"&a ", b"*a", b"!!bool ", b"<<: ", b"1:30", b"? ", b"| ", b"%",
    b"#",
)  # fmt: skip
SETS = ("lora.rank", "evaluation.top_k", "candidates", "seeds", "methods", "dmole.router.top_k", "stream", "output",
        "training.learning_rate", "declaration.candidates", "training", "a.b.c", "dmole")  # fmt: skip


def damaged(data: bytes, chance: random.Random) -> bytes:
    """`data` after some edits of bytes."""
    for _ in range(chance.choice((0, 0, 1, 1, 2, 5))):
        place = chance.randrange(len(data) + 1)
        end = place + chance.choice((0, 0, 1, 3, 20))
        data = data[:place] + chance.choice(BYTES) + data[end:]
    return data


def edited(value: Any, chance: random.Random) -> Any:
    """A JSON value with one place in it replaced, renamed, added or removed."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        found = dict(value)
        action = chance.random()
        if action < 0.1:
            del found[key]
        elif action < 0.2:
            found[chance.choice(("x", "\ud83d", "", "id", "image", "seeds", "k" * 500))] = chance.choice(VALUES)
        else:
            found[key] = edited(value[key], chance)
        return found
    if isinstance(value, list) and value and chance.random() < 0.5:
        index = chance.randrange(len(value))
        return [*value[:index], edited(value[index], chance), *value[index + 1 :]]
    return chance.choice(VALUES)


def record(chance: random.Random) -> bytes:
    row: Any = {"id": "s9", "image": "a.png", "instruction": "Describe.", "answers": ["a square"], "entities": ["e"]}
    for _ in range(chance.choice((0, 1, 1, 2))):
        row = edited(row, chance)
    with limitless():
        text = json.dumps(row, ensure_ascii=chance.random() < 0.5)
    return damaged(text.encode("utf-8", "surrogatepass"), chance)


@contextlib.contextmanager
def limitless() -> Iterator[None]:
    """Long integers may be written, by the fuzzer alone."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(before)


def read_record(content: bytes, folder: Path) -> None:
    rows = [json.dumps({"id": f"s{i}", "image": "a.png", "instruction": "?", "answers": ["b"]}) for i in range(2)]
    first = content + b"\n" + "\n".join(rows).encode() + b"\n"
    (folder / "a" / "train.jsonl").write_bytes(first)
    read_stream(folder, check_images=False)


def make_stream(folder: Path) -> None:
    (folder / "a").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a" / "a.png")
    (folder / "stream.yaml").write_text("name: s\ntasks:\n- {name: a, metric: exact_match, directory: a}\n")
    row = {"id": "t", "image": "a.png", "instruction": "?", "answers": ["b"]}
    (folder / "a" / "test.jsonl").write_text(json.dumps(row) + "\n")


def configuration(chance: random.Random) -> dict[str, Any]:
    plain: Any = RunConfig().to_dict()
    for _ in range(chance.choice((0, 1, 1, 2, 4))):
        key = chance.choice(list(plain))
        plain = {**plain, key: edited(plain[key], chance)}
    if chance.random() < 0.1:
        plain[chance.choice(("x", "\ud83d", "k" * 500, 7))] = chance.choice(VALUES)
    return plain


def setting(chance: random.Random) -> str:
    with limitless():
        text = json.dumps(chance.choice(VALUES), ensure_ascii=chance.random() < 0.5)
    whole = f"{chance.choice(SETS)}={text}".encode("utf-8", "surrogatepass")
    return damaged(whole, chance).decode("utf-8", "surrogateescape")


def _as_record(chance: random.Random, folder: Path) -> None:
    read_record(record(chance), folder)


def _as_configuration(chance: random.Random, folder: Path) -> None:
    build_config(configuration(chance)).to_dict()


def _as_setting(chance: random.Random, folder: Path) -> None:
    load_config(overrides=[setting(chance)]).to_dict()


KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    "records": _as_record, "configurations": _as_configuration, "settings": _as_setting,
}  # fmt: skip


def _too_long(*_: object) -> None:
    raise TimeoutError(f"no answer in {SECONDS} seconds")


def outcome(kind: str, number: int, seed: int, folder: Path) -> str:
    """ "read", "finding", "ConfigError", or "wrong: ..."."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        KINDS[kind](random.Random(f"{kind}/{seed}/{number}"), folder)
    except DataError as error:
        os.fsencode(str(error)).decode()
        return "finding" if all(map(FINDING.fullmatch, error.problems)) else f"wrong: {error}"
    except ConfigError as error:
        return "ConfigError" if str(error).isprintable() or "\n" in str(error) else f"wrong: {error!r}"
    except BaseException as error:
        return f"wrong: {type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
    return "read"


def fuzz(number: int, seed: int) -> dict[str, Any]:
    """The record of a run: `number` of each kind."""
    counts: dict[str, dict[str, int]] = {}
    wrong: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        make_stream(Path(name))
        for kind in KINDS:
            found: collections.Counter[str] = collections.Counter()
            for index in range(number):
                result = outcome(kind, index, seed, Path(name))
                found[result.split(":")[0]] += 1
                if result.startswith("wrong"):
                    wrong.append({"kind": kind, "number": index, "outcome": ascii(result)})
                    print(wrong[-1], file=sys.stderr, flush=True)
            counts[kind] = dict(sorted(found.items()))
    return {"number": number, "seed": seed, "outcomes": counts, "wrong": wrong, "seconds_allowed": SECONDS}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--number", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    git = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    # Asked for before the run, which is long: what is committed meanwhile did not make it.
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    found = fuzz(options.number, options.seed) | {"commit": commit}
    found["date"] = datetime.date.today().isoformat()
    print(json.dumps(found["outcomes"], indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
