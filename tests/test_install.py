# SPDX-License-Identifier: Apache-2.0
"""Installing from source, away from this checkout: the source distribution, the wheels made of it, what they need.

Everything is installed into fresh environments that hold torch and what torch requires, and nothing else. The files
there are hard links to the ones installed beside this interpreter: no download, and pip sees an ordinary installation.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from dmole_kernels import triton_backend

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("dmole", "dmole_kernels", "mini_cmit")
# A part of `mini_cmit` that imports `benchmarks`, which only a checkout has.
CHECKOUT_ALONE = "mini_cmit/benchmarks/"
# The rest of a checkout that setuptools could pick up by mistake.
OTHERS = ("tests", "benchmarks", "examples", "scripts", "docs")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE")
COMPILER = os.environ.get("CXX", "c++")
# torch's CUDA builds for Linux, Python 3.11 -> the Triton that their metadata pins; read in November 2026.
PINNED_BY_TORCH = {
    "2.6.0": "3.2.0", "2.7.1": "3.3.1", "2.8.0": "3.4.0", "2.9.0": "3.5.0", "2.9.1": "3.5.1", "2.10.0": "3.6.0",
    "2.11.0": "3.6.0", "2.12.0": "3.7.0", "2.12.1": "3.7.1", "2.13.0": "3.7.1", "2.14.1": "3.8.0",
}  # fmt: skip

# Two experts on two samples against the formula in float64, by hand; the second sample uses neither.
USE = """
import sys
import torch
import dmole_kernels
from dmole_kernels import ExpertGates, MultiLoRALinear, cpu, cuda, reference, testing, triton_backend

assert not {"numpy", "peft", "safetensors", "transformers", "triton"} & set(sys.modules)
generator = torch.Generator().manual_seed(0)
base = torch.nn.Linear(6, 5)
gates = ExpertGates()
layer = MultiLoRALinear(base, gates=gates)
for name, rank in (("one", 2), ("two", 3)):
    layer.bank.add(name, rank=rank, alpha=2.0 * rank)
with torch.no_grad():
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
x = torch.randn(2, 4, 6, generator=generator).requires_grad_()
gate = torch.tensor([[1.0, 0.5], [0.0, 0.0]])
with gates.use(gate, ["one", "two"]):
    y = layer(x)
y.square().sum().backward()

x64 = x.detach().double().requires_grad_()
experts = [(expert.lora_a, expert.lora_b) for expert in map(layer.bank.expert, ("one", "two"))]
truths = [tuple(weight.detach().double().requires_grad_() for weight in pair) for pair in experts]
expected = x64 @ base.weight.detach().double().T + base.bias.detach().double()
for column, (a, b) in enumerate(truths):
    expected = expected + gate[:, column, None, None].double() * 2.0 * (x64 @ a.T) @ b.T
expected.square().sum().backward()
close = dict(rtol=1e-4, atol=1e-4)
torch.testing.assert_close(y.double(), expected, **close)
torch.testing.assert_close(x.grad.double(), x64.grad, **close)
for ours, truth in zip(sum(experts, ()), sum(truths, ()), strict=True):
    torch.testing.assert_close(ours.grad.double(), truth.grad, **close)
print("as expected, from", dmole_kernels.__file__)
"""

# What a package beside torch is for, and the error that names the package where it is missing.
SAVE = """
from pathlib import Path
import torch
from dmole_kernels import convert, save_experts

model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
convert(model).add("charts", rank=2)
try:
    save_experts(model, "experts")
except ImportError as error:
    print(error)
assert not Path("experts/charts").exists()
"""

# The mini benchmark's builders and the pretraining on them need the extra `data`, the server what the extra `serve`
# brings; every other module has to import.
IMPORT_ALL = """
import importlib, pkgutil
import dmole, mini_cmit

packages = [*pkgutil.walk_packages(dmole.__path__, "dmole."), *pkgutil.walk_packages(mini_cmit.__path__, "mini_cmit.")]
for module in packages:
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if module.name == "dmole.grown.serving" and error.name == "fastapi":
            continue
        if not module.name.startswith(("mini_cmit.tasks.", "mini_cmit.pretraining")):
            raise
"""


def installed(names: Iterable[str]) -> dict[str, Distribution]:
    """{name: distribution} of those names, of what they require on this machine, and so on."""
    found: dict[str, Distribution] = {}
    waiting = [Requirement(name) for name in names]
    seen: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        found[canonicalize_name(requirement.name)] = held = distribution(requirement.name)
        extras = ("", *requirement.extras)
        for child in map(Requirement, held.requires or []):
            if child.marker is None or any(child.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(child)
    return found


def link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


class Environment:
    """A virtual environment of the given distributions; pip is this interpreter's own, told to work on it."""

    def __init__(self, folder: Path, distributions: dict[str, Distribution]) -> None:
        venv.create(folder, symlinks=os.name != "nt")
        self.folder, self.names = folder, set(distributions)
        self.scripts = folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = str(self.scripts / "python")
        site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
        for name, held in distributions.items():
            assert held.files is not None, f"{name} has no record of its files; install it with pip"
            for file in held.files:
                if ".." not in file.parts:  # scripts, which name another interpreter
                    (site / file).parent.mkdir(parents=True, exist_ok=True)
                    link(str(file.locate()), str(site / file))

    def run(self, *arguments: str, compiler: bool = False, **settings: str) -> subprocess.CompletedProcess[str]:
        """`python ...` in the environment: without a compiler, unless asked for, and with nothing of this checkout."""
        return self._run([self.python, *arguments], compiler, settings)

    def pip(self, *arguments: str, compiler: bool = False, **settings: str) -> subprocess.CompletedProcess[str]:
        quiet = ("--disable-pip-version-check", "--no-input")
        return self._run([sys.executable, "-m", "pip", "--python", self.python, *quiet, *arguments], compiler, settings)

    def _run(self, command: list[str], compiler: bool, settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DMOLE"))}
        if not compiler:
            environment |= {"CXX": "c++", "CC": "cc", "PATH": str(self.scripts)}
        environment |= {"CUDA_HOME": str(self.folder / "no_cuda"), **settings}
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, env=environment)

    def wheel(self, archive: Path, target: Path, build: str, **settings: object) -> subprocess.CompletedProcess[str]:
        options = ["--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir", "-v", "-w", str(target)]
        return self.pip("wheel", *options, str(archive), DMOLE_KERNELS_BUILD=build, **settings)  # type: ignore[arg-type]

    def install(self, wheel: Path, *options: str) -> None:
        done = self.pip("install", "--no-index", "--no-compile", *options, str(wheel))
        assert done.returncode == 0, done.stderr


def only_file(folder: Path, pattern: str) -> Path:
    (file,) = folder.glob(pattern)
    return file


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a checkout, without anything that was built in place."""
    folder = tmp_path_factory.mktemp("sources") / "dmole"
    folder.mkdir()
    built = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    for name in ("csrc", *PACKAGES, *OTHERS):
        shutil.copytree(ROOT / name, folder / name, ignore=built)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def torch_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """torch and what it requires; setuptools, which builds without isolation need, too."""
    folder = tmp_path_factory.mktemp("torch_alone")
    yield Environment(folder / "environment", installed(["torch", "setuptools"]))
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def archive(sources: Path, torch_alone: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, made by the build backend as `python -m build --sdist` asks it to."""
    target = tmp_path_factory.mktemp("archive")
    code = (
        f"import os; os.chdir({str(sources)!r}); from setuptools import build_meta as b; b.build_sdist({str(target)!r})"
    )
    done = torch_alone.run("-c", code)
    assert done.returncode == 0, done.stderr
    return only_file(target, "*.tar.gz")


@pytest.fixture(scope="module")
def pure_wheel(archive: Path, torch_alone: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that comes of no compiler: the build says so, once."""
    target = tmp_path_factory.mktemp("pure_wheel")
    done = torch_alone.wheel(archive, target, "auto")
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count(
        "dmole_kernels: built without the compiled kernels (the compiler failed"
    ) == 1
    return only_file(target, "*.whl")


def package_files(sources: Path, names: Sequence[str]) -> set[str]:
    files = {str(file.relative_to(sources)) for name in names for file in (sources / name).rglob("*") if file.is_file()}
    return {name for name in files if not name.startswith(CHECKOUT_ALONE)}


def test_the_source_distribution_holds_what_a_build_needs(sources: Path, archive: Path) -> None:
    with tarfile.open(archive) as held:
        names = {member.name.partition("/")[2] for member in held.getmembers() if member.isfile()}
    assert package_files(sources, ["csrc", *PACKAGES]) - names == set()
    assert set(FILES) <= names
    assert {name.split("/")[0] for name in names} <= {
        *FILES,
        "csrc",
        *PACKAGES,
        "dmole.egg-info",
        "PKG-INFO",
        "setup.cfg",
    }


@pytest.mark.slow
def test_the_wheel_holds_the_three_packages_alone(sources: Path, pure_wheel: Path) -> None:
    with zipfile.ZipFile(pure_wheel) as held:
        names = set(held.namelist())
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA")).rpartition("/")[0]
        entry_points = held.read(f"{metadata}/entry_points.txt").decode()
    assert {name for name in names if not name.startswith(f"{metadata}/")} == package_files(sources, PACKAGES)
    assert {f"{metadata}/licenses/LICENSE", f"{metadata}/licenses/NOTICE"} <= names
    assert "dmole = dmole.cli:main" in entry_points
    assert "mini = mini_cmit.model.shipped:mini_folder" in entry_points


@pytest.mark.slow
def test_the_kernels_need_torch_alone(pure_wheel: Path, torch_alone: Environment) -> None:
    torch_alone.install(pure_wheel, "--no-deps")
    listed = torch_alone.run("-c", "from importlib.metadata import *; print(*(d.name for d in distributions()))")
    assert {canonicalize_name(name) for name in listed.stdout.split()} == torch_alone.names | {"dmole"}
    # torch itself warns where numpy is missing; this package adds no warning of its own.
    warnings = ("-W", "error", "-W", "ignore:Failed to initialize NumPy")
    done = torch_alone.run(*warnings, "-c", USE)
    assert (done.returncode, done.stderr) == (0, "")
    assert str(torch_alone.folder) in done.stdout
    saved = torch_alone.run(*warnings, "-c", SAVE)
    assert (saved.returncode, saved.stderr) == (0, "")
    assert saved.stdout.endswith("is not installed; expected it for folders of experts. Run pip install safetensors.\n")
    said = torch_alone.run(*warnings, "-m", "dmole_kernels")
    assert (said.returncode, said.stderr) == (0, "")
    first, *others = said.stdout.splitlines()
    assert first.startswith("backend   reference  ") and "multi_lora" in first and "'cpu'," not in first
    assert first.endswith(" with a kernel for cpu; 'cpu' is not built: No module named 'dmole_kernels._C'")
    assert not any("not built" in line for line in others)


@pytest.mark.slow
def test_skip_builds_nothing_and_says_nothing(archive: Path, torch_alone: Environment, tmp_path: Path) -> None:
    done = torch_alone.wheel(archive, tmp_path, "skip")
    assert done.returncode == 0, done.stderr
    assert "dmole_kernels: built without" not in done.stdout + done.stderr
    assert only_file(tmp_path, "*.whl").name.endswith("-py3-none-any.whl")


@pytest.mark.slow
def test_without_a_compiler_require_is_an_error(archive: Path, torch_alone: Environment, tmp_path: Path) -> None:
    compiler = str(tmp_path / "no_compiler")
    done = torch_alone.wheel(archive, tmp_path, "require", CXX=compiler, CC=compiler)
    assert done.returncode != 0 and not list(tmp_path.glob("*.whl"))
    assert f"No such file or directory: '{compiler}'" in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(shlex.split(COMPILER)[0]) is None, reason="no C++ compiler")
def test_with_a_compiler_the_kernels_are_built_and_run(archive: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment", installed(["torch", "setuptools", "ninja"]))
    # Unoptimized, which comes last and wins: half a minute instead of several.
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" -O0\n')
    compiler.chmod(0o755)
    path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"]))  # ninja builds in parallel
    done = environment.wheel(archive, tmp_path, "require", compiler=True, CXX=str(compiler), PATH=path)
    assert done.returncode == 0, done.stderr
    wheel = only_file(tmp_path, "*.whl")
    with zipfile.ZipFile(wheel) as held:
        assert len([name for name in held.namelist() if name.startswith("dmole_kernels/_C.")]) == 1
    environment.install(wheel, "--no-deps")
    said = environment.run("-W", "ignore:Failed to initialize NumPy", "-m", "dmole_kernels")
    assert any(line.startswith("backend   cpu ") and "multi_lora" in line for line in said.stdout.splitlines())
    assert said.stderr == ""
    done = environment.run("-W", "error", "-W", "ignore:Failed to initialize NumPy", "-c", USE)
    assert (done.returncode, done.stderr) == (0, "")
    shutil.rmtree(environment.folder)


@pytest.mark.slow
def test_the_declared_dependencies_run_the_application(pure_wheel: Path, tmp_path: Path) -> None:
    """`pip install dmole` and no extra: pip finds nothing missing, the command runs, the modules import."""
    with zipfile.ZipFile(pure_wheel) as held:
        (metadata,) = (name for name in held.namelist() if name.endswith(".dist-info/METADATA"))
        lines = held.read(metadata).decode().splitlines()
    needed = [
        line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]
    environment = Environment(tmp_path / "environment", installed(needed))
    environment.install(wheel=pure_wheel)  # pip resolves: nothing may be missing, for there is no index
    done = environment.pip("check")
    assert done.returncode == 0, done.stdout
    done = environment.run("-W", "error", str(environment.scripts / "dmole"), "doctor")
    assert done.stderr == "" and "'cpu' is not built" in done.stdout
    lines = done.stdout.splitlines()
    assert {canonicalize_name(Requirement(line).name) for line in needed} <= {
        line.split()[1] for line in lines if line.startswith("ok ")
    }
    done = environment.run("-W", "error", "-c", IMPORT_ALL)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    shutil.rmtree(environment.folder)


def test_an_unknown_mode_is_an_error(sources: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=sources, capture_output=True, text=True, env={**os.environ, "DMOLE_KERNELS_BUILD": "maybe"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "DMOLE_KERNELS_BUILD is 'maybe'; expected 'auto', 'require' or 'skip'." in done.stderr


def test_the_extra_triton_is_what_the_kernels_were_run_with_and_what_torch_pins() -> None:
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"triton = [\"triton{triton_backend.VERSIONS}; platform_system == 'Linux'\"]" in declared
    pinned = dict(PINNED_BY_TORCH)
    for requirement in map(Requirement, distribution("torch").requires or []):
        if requirement.name == "triton" and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            pinned["installed"] = sorted(spec.version for spec in requirement.specifier)[0]
    accepted = SpecifierSet(triton_backend.VERSIONS)
    assert {torch: triton for torch, triton in pinned.items() if triton not in accepted} == {}
