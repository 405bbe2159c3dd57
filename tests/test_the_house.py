# SPDX-License-Identifier: Apache-2.0
"""ARCHITECTURE.md names every room and module once, and CONTRIBUTING.md's promises about where things go hold."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from dmole.methods import Method, method_class, method_names
from scripts.code_lines import SHARED_BY_METHODS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("dmole", "dmole_kernels", "mini_cmit", "benchmarks")


def named_rooms() -> tuple[Counter[str], set[str]]:
    """The paths that the first column names, and the folders of one file a thing, whose files are not named."""
    named: Counter[str] = Counter()
    open_rooms: set[str] = set()
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = page[page.index("| room |") : page.index("\n## ", page.index("| room |"))]
    for line in table.splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) < 2:
            continue
        folder = ""
        for name in re.findall(r"`([^`]+)`", cells[0]):
            path = name if "/" in name else f"{folder}{name}"
            # The names after a path are in its folder.
            folder = path if path.endswith("/") else path.rpartition("/")[0] + "/"
            named[path] += 1
            if path.endswith("/") and ("one file" in cells[1] or not path.startswith(("dmole/", "dmole_kernels/"))):
                open_rooms.add(path)
    return named, open_rooms


NAMED, OPEN_ROOMS = named_rooms()


@pytest.mark.parametrize("package", PACKAGES)
def test_the_page_names_every_folder_and_module_once(package: str) -> None:
    files = [path.relative_to(ROOT) for path in sorted((ROOT / package).rglob("*.py"))]
    folders = {f"{path.parent.as_posix()}/" for path in files if path.parent.as_posix() != package}
    modules = {
        path.as_posix()
        for path in files
        if path.name != "__init__.py" and f"{path.parent.as_posix()}/" not in OPEN_ROOMS
    }
    counts = {path: NAMED[path] for path in sorted(folders | modules)}
    assert {path: count for path, count in counts.items() if count != 1} == {}


def test_what_the_page_names_is_there() -> None:
    assert [path for path in NAMED if "<" not in path and not list(ROOT.glob(path))] == []


def test_an_op_is_a_file_with_its_ops_a_test_and_an_equation() -> None:
    files = [
        file for file in (ROOT / "dmole_kernels").glob("_*.py") if re.search(r"^\w+ = Op\(", file.read_text(), re.M)
    ]
    assert len(files) >= 4
    for file in files:
        assert (ROOT / "tests" / "kernels" / f"test{file.stem}.py").is_file(), file.name
        first = (ast.get_docstring(ast.parse(file.read_text()), clean=True) or "").splitlines()[0]
        assert "=" in first or first.startswith("Equals"), f"{file.name} opens with {first!r}"


@pytest.mark.parametrize("name", method_names())
def test_a_method_is_one_file_with_one_class_and_one_test(name: str) -> None:
    folder = ROOT / "dmole" / "methods"
    method = method_class(name)
    home = Path(folder / f"{name}.py") if (folder / f"{name}.py").is_file() else folder / name / "method.py"
    assert method.__module__ == ".".join(home.relative_to(ROOT).with_suffix("").parts)
    classes = [node.name for node in ast.parse(home.read_text()).body if isinstance(node, ast.ClassDef)]
    assert classes.count(method.__name__) == 1 and issubclass(method, Method)
    tests = [*(ROOT / "tests" / "dmole" / "methods").rglob("test_*.py")]
    assert any(f'"{name}"' in test.read_text() or method.__name__ in test.read_text() for test in tests)


def test_a_method_knows_no_other_method() -> None:
    """A method imports what every method is given, and of its own folder; a private file is shared by several."""
    folder = ROOT / "dmole" / "methods"
    for file in folder.rglob("*.py"):
        own = file.relative_to(folder).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if module.startswith("dmole.methods.") and file.name not in SHARED_BY_METHODS:
                other = module.split(".")[2]
                assert other in (own, "base", "budget", "settings") or other.startswith("_"), f"{file}: {module}"


def test_nothing_is_timed_in_a_test() -> None:
    """No assertion compares a clock's reading. `pytest-benchmark`'s reports are made by benchmarks, not by tests."""
    clocks = ("perf_counter", "monotonic", "process_time")
    for file in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assert):
                used = {one.attr for one in ast.walk(node.test) if isinstance(one, ast.Attribute)}
                assert not used & set(clocks), f"{file.name}:{node.lineno} asserts on a clock"
