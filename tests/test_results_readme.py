# SPDX-License-Identifier: Apache-2.0
"""results/README.md lists every committed result, with the commit that the result itself names."""

import json
import re
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parent.parent / "results"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (RESULTS / "README.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| `")
]


def test_every_result_is_listed_once() -> None:
    entries = [path.name + "/" * path.is_dir() for path in RESULTS.iterdir() if path.name != "README.md"]
    assert sorted(row[0].strip("`") for row in ROWS) == sorted(entries)


@pytest.mark.parametrize("row", ROWS, ids=[row[0].strip("`/") for row in ROWS])
def test_the_commit_is_the_one_that_the_result_names(row: list[str]) -> None:
    path, commit = RESULTS / row[0].strip("`/"), row[3]
    assert re.fullmatch(r"[0-9a-f]{12}\+?", commit)
    if path.is_dir():
        named = {json.loads(file.read_bytes())["commit"] for file in path.glob("runs/*/environment.json")}
    elif path.suffix == ".json":
        record = json.loads(path.read_bytes())
        named = {record["commit"] if "commit" in record else record["environment"]["commit"]}
    else:
        return  # a CSV names no commit
    assert {name[:12] + "+" * name.endswith("+") for name in named} == {commit}
