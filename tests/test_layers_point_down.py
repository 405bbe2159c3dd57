# SPDX-License-Identifier: Apache-2.0
"""The arrow: mini_cmit -> dmole -> dmole_kernels' public names; none knows those above it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmole_kernels

ROOT = Path(__file__).resolve().parent.parent
KERNEL_FILES = sorted((ROOT / "dmole_kernels").rglob("*.py"))
APPLICATION_FILES = sorted((ROOT / "dmole").rglob("*.py"))


def imports(file: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(module, names) of every import anywhere in the file; names are () for ``import module``."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", tuple(alias.name for alias in node.names)


@pytest.mark.parametrize("file", KERNEL_FILES, ids=lambda file: file.stem)
def test_kernels_do_not_know_the_application(file: Path) -> None:
    above = ("dmole", "mini_cmit", "transformers", "benchmarks")
    known = [module for module, _ in imports(file) if module.split(".")[0] in above]
    assert known == []


@pytest.mark.parametrize("file", APPLICATION_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_application_uses_public_names_only(file: Path) -> None:
    used = [(module, names) for module, names in imports(file) if module.split(".")[0] == "dmole_kernels"]
    assert [module for module, _ in imports(file) if module.split(".")[0] in ("mini_cmit", "benchmarks")] == []
    for module, names in used:
        assert module == "dmole_kernels", f"{file} reaches into {module}"
        assert set(names) <= set(dmole_kernels.__all__)


def test_there_is_something_to_check() -> None:
    assert len(KERNEL_FILES) >= 10
    assert any(module == "dmole_kernels" for file in APPLICATION_FILES for module, _ in imports(file))


@pytest.mark.parametrize(
    "folder", ["dmole", "dmole_kernels", "mini_cmit", "benchmarks", "tests", "scripts", "examples"]
)
def test_every_source_file_names_its_licence(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert [
        f for f in files if not f.read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: Apache-2.0")
    ] == []


def test_the_page_of_the_house_names_every_module_of_the_kernels() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    modules = [path.name for path in (ROOT / "dmole_kernels").glob("*.py") if path.name != "__init__.py"]
    assert [name for name in modules if f"`{name}`" not in page and f"/{name}`" not in page] == []
