# SPDX-License-Identifier: Apache-2.0
"""The arrows: mini_cmit -> dmole -> dmole_kernels' public names, benchmarks -> dmole_kernels; no cycle inside dmole."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

import dmole_kernels
from dmole.config import EvaluationSettings
from dmole.methods import method_names

ROOT = Path(__file__).resolve().parent.parent
KERNEL_FILES = sorted((ROOT / "dmole_kernels").rglob("*.py"))
APPLICATION_FILES = sorted((ROOT / "dmole").rglob("*.py"))
BENCHMARK_FILES = sorted((ROOT / "benchmarks").rglob("*.py"))
# What knows methods by their hooks alone: everything of dmole but the methods themselves and published recipes.
ROOMS_WITHOUT_A_METHOD_S_NAME = [
    file
    for file in APPLICATION_FILES
    if "methods" not in file.relative_to(ROOT).parts and file.relative_to(ROOT) != Path("dmole/recipes.py")
]


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


def imports(file: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(module, names) of every import anywhere in the file; names are () for ``import module``."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), tuple(alias.name for alias in node.names)


def packages(file: Path) -> set[str]:
    """The top packages that a file imports; a relative import is "", which the house does not use."""
    return {module.split(".")[0] for module, _ in imports(file)}


def modules(root: Path, package: str) -> dict[str, Path]:
    """{dotted name: file} of a package; its `__init__` has the package's own name."""
    found = {}
    for file in sorted((root / package).rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def runtime_imports(file: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """`imports`, without those under `if TYPE_CHECKING:`, which no run follows."""
    pending: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", tuple(alias.name for alias in node.names)
        pending += ast.iter_child_nodes(node)


def import_graph(root: Path, package: str) -> dict[str, set[str]]:
    """{module: modules of the package that it imports}, at its top or inside a function alike.

    ``from a.b import c`` is an edge to the module a.b.c where there is one, else to a.b. Importing a.b.c also runs the
    `__init__` of a and a.b: edges to those that are not the importing module's own packages.
    """
    known = modules(root, package)
    graph: dict[str, set[str]] = {}
    for name, file in known.items():
        edges = set()
        for module, names in runtime_imports(file):
            for target in [f"{module}.{other}" for other in names] or [module]:
                edges |= {target if target in known else module} & known.keys()
        parents = {".".join(edge.split(".")[:depth]) for edge in edges for depth in range(1, edge.count(".") + 1)}
        own = {".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 1)}
        graph[name] = (edges | parents - own) - {name}
    return graph


def cycle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """The modules of one cycle in order, or []."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if found := visit(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


@pytest.mark.parametrize("file", KERNEL_FILES, ids=relative)
def test_kernels_do_not_know_the_application(file: Path) -> None:
    assert packages(file) & {"dmole", "mini_cmit", "transformers", "benchmarks"} == set()


@pytest.mark.parametrize("file", APPLICATION_FILES, ids=relative)
def test_the_application_uses_public_names_only(file: Path) -> None:
    assert packages(file) & {"mini_cmit", "benchmarks"} == set()
    # Not by name either: what the benchmark offers is found by entry points.
    assert "mini_cmit" not in file.read_text(encoding="utf-8")
    for module, names in imports(file):
        if module.split(".")[0] == "dmole_kernels":
            assert module == "dmole_kernels", f"{file} reaches into {module}"
            assert set(names) <= set(dmole_kernels.__all__)


@pytest.mark.parametrize("file", BENCHMARK_FILES, ids=relative)
def test_benchmarks_do_not_know_the_application(file: Path) -> None:
    assert packages(file) & {"dmole", "mini_cmit"} == set()


@pytest.mark.parametrize("package", ["dmole", "dmole_kernels", "mini_cmit", "benchmarks"])
def test_no_import_is_relative(package: str) -> None:
    assert [relative(file) for file in (ROOT / package).rglob("*.py") if "" in packages(file)] == []


@pytest.mark.parametrize("package", ["dmole", "mini_cmit", "benchmarks"])
def test_no_cycle_of_imports(package: str) -> None:
    assert cycle(import_graph(ROOT, package)) == []


def test_a_cycle_is_found_at_the_top_and_inside_a_function_and_through_a_package(tmp_path: Path) -> None:
    house = tmp_path / "house"
    (house / "room").mkdir(parents=True)
    (house / "__init__.py").write_text("")
    (house / "room" / "__init__.py").write_text("from house.door import open\n")
    (house / "room" / "table.py").write_text("")
    (house / "door.py").write_text("def open():\n    return 1\n")
    assert cycle(import_graph(tmp_path, "house")) == []
    # Lazily; `from house.room import table` runs the room's own file, which needs the door.
    (house / "door.py").write_text("def open():\n    from house.room import table\n")
    assert cycle(import_graph(tmp_path, "house")) == ["house.door", "house.room", "house.door"]
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.room import table\n"
    (house / "door.py").write_text(typed)
    assert cycle(import_graph(tmp_path, "house")) == []
    (house / "door.py").write_text("import house.window\n")
    (house / "window.py").write_text("from house import door\n")
    assert cycle(import_graph(tmp_path, "house")) == ["house.door", "house.window", "house.door"]


@pytest.mark.parametrize("file", ROOMS_WITHOUT_A_METHOD_S_NAME, ids=relative)
def test_no_room_knows_a_method_by_name(file: Path) -> None:
    own = {f"dmole.methods.{name}" for name in method_names()}
    assert [module for module, _ in imports(file) if ".".join(module.split(".")[:3]) in own] == []
    # `evaluation.zero_shot` is a setting, and the package and its command are called like one of the methods.
    names = set(method_names()) - {"dmole"} - set(EvaluationSettings.__dataclass_fields__)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert [text for text in texts if names & set(text.replace(",", " ").replace("=", " ").split())] == []
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    asked = [node for node in calls if ast.unparse(node.func).endswith(("method_class", "method_settings"))]
    assert [ast.unparse(node) for node in asked if isinstance(node.args[0], ast.Constant)] == []
    read = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in method_names()]
    assert [node.attr for node in read if node.attr != "zero_shot"] == []


def test_there_is_something_to_check() -> None:
    assert len(KERNEL_FILES) >= 10 and len(BENCHMARK_FILES) >= 20 and len(ROOMS_WITHOUT_A_METHOD_S_NAME) >= 50
    assert any(module == "dmole_kernels" for file in APPLICATION_FILES for module, _ in imports(file))
    graph = import_graph(ROOT, "dmole")
    assert "dmole.methods" in graph["dmole.config"] and "dmole.runs.runner" in graph["dmole.cli"]


@pytest.mark.parametrize(
    "folder", ["dmole", "dmole_kernels", "mini_cmit", "benchmarks", "tests", "scripts", "examples"]
)
def test_every_source_file_names_its_licence(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert [
        f for f in files if not f.read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: Apache-2.0")
    ] == []
