# SPDX-License-Identifier: Apache-2.0
"""Installing from source, away from this checkout: what a source distribution holds, and what comes of no compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("csrc", "dmole_kernels", "dmole")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what an installation reads, without anything that was built in place."""
    folder = tmp_path_factory.mktemp("sources") / "dmole"
    folder.mkdir()
    built = shutil.ignore_patterns("*.so", "__pycache__")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=built)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "CXX": "/nonexistent/c++", "CC": "/nonexistent/cc", **environment}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=settings)


def install(sources: Path, target: Path, build: str) -> subprocess.CompletedProcess[str]:
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "-v"]
    return run(
        [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(sources)],
        sources,
        DMOLE_KERNELS_BUILD=build,
    )


def what_runs(target: Path) -> str:
    """`python -m dmole_kernels` of that installation; -S keeps this checkout out of sight."""
    path = os.pathsep.join((str(target), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    done = run([sys.executable, "-S", "-m", "dmole_kernels"], target, PYTHONPATH=path)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("build", ["skip", "auto"])
def test_without_a_compiler_the_pure_installation_works_and_says_why_once(
    sources: Path, tmp_path: Path, build: str
) -> None:
    done = install(sources, tmp_path, build)
    assert done.returncode == 0, done.stderr
    said = "dmole_kernels: built without the compiled kernels (the compiler failed"
    assert (done.stdout + done.stderr).count(said) == (1 if build == "auto" else 0)
    assert not list((tmp_path / "dmole_kernels").glob("_C*"))
    first, *others = what_runs(tmp_path).splitlines()
    assert first.startswith("backend   reference (the first of (") and "'cpu'," not in first
    assert first.endswith(" that serves cpu; 'cpu' is not built: No module named 'dmole_kernels._C')")
    assert not any("not built" in line for line in others)


@pytest.mark.slow
def test_without_a_compiler_require_is_an_error(sources: Path, tmp_path: Path) -> None:
    done = install(sources, tmp_path, "require")
    assert done.returncode != 0
    assert "Error compiling objects for extension" in done.stdout + done.stderr


def test_an_unknown_mode_is_an_error(sources: Path) -> None:
    done = run([sys.executable, "setup.py", "--version"], sources, DMOLE_KERNELS_BUILD="maybe")
    assert done.returncode == 1
    assert "DMOLE_KERNELS_BUILD is 'maybe'; expected 'auto', 'require' or 'skip'." in done.stderr


def test_the_source_distribution_holds_what_a_build_needs(sources: Path, tmp_path: Path) -> None:
    done = run(
        [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)], sources, DMOLE_KERNELS_BUILD="skip"
    )
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as held:
        names = {name.partition("/")[2] for name in held.getnames()}
    files = (file for folder in FOLDERS for file in (sources / folder).rglob("*") if file.is_file())
    wanted = {str(file.relative_to(sources)) for file in files}
    assert wanted - names == set()
    assert {"setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "NOTICE", "README.md"} <= names
    assert not any(name.endswith(".so") or name.startswith("tests") for name in names)
