# SPDX-License-Identifier: Apache-2.0
"""Files inside installed packages, found without importing the packages.

Importing statsmodels or vega_datasets costs seconds (scipy, pandas) and the benchmark only wants their tables.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import unicodedata
from pathlib import Path


def package_file(package: str, *parts: str) -> Path:
    """The path of a data file of an installed package.

    Raises:
        ValueError: the package or the file isn't there; the message names what to install.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"the mini benchmark reads {'/'.join(parts)} from the package {package!r}, which isn't installed. "
            "Install dmole with its extra for the mini benchmark."
        )
    path = Path(next(iter(spec.submodule_search_locations))).joinpath(*parts)
    if not path.is_file():
        raise ValueError(
            f"package {package!r} has no file {'/'.join(parts)}; the pinned version has. "
            "Install the versions that dmole's extra for the mini benchmark pins."
        )
    return path


def read_table(package: str, *parts: str) -> list[dict[str, str]]:
    """The rows of a CSV table (gzip or plain) of an installed package, each as {column: text}."""
    path = package_file(package, *parts)
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return list(csv.DictReader(io.StringIO(raw.decode("utf-8-sig"), newline="")))


def plain(text: str) -> str:
    """ASCII letters only: "São Tomé" becomes "Sao Tome", because a small tokenizer has seen few accents."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii").strip()


def slug(text: str) -> str:
    """The lower-case, hyphenated form of a name, used inside entity ids."""
    return "-".join("".join(c if c.isalnum() else " " for c in plain(text).lower()).split())
