# SPDX-License-Identifier: Apache-2.0
"""The kernels of csrc/cuda as host C++ (emulator/README.md), behind the very op that a CUDA build registers."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dmole_kernels import _backend as backend
from dmole_kernels import cuda
from dmole_kernels._multi_lora import BACKWARD, FORWARD

ROOT = Path(__file__).resolve().parents[3]
EMULATOR = Path(__file__).resolve().parent / "emulator"
COMPILE = (
    "g++", "-std=c++17", "-O1", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off",
    "-fno-strict-aliasing", f"-I{EMULATOR}", "-x", "c++",
)  # fmt: skip
# What a GPU may do and a host silently allows, such as a wide load from a narrow address, ends the process.
SANITIZE = ("-fsanitize=undefined", "-fno-sanitize-recover=undefined")
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FENCE = 64  # unwritten numbers before and behind every output

Change = tuple[str, str]  # text of a source, and what stands there instead
BuildKernels = Callable[[str, Sequence[Change]], "HostKernels"]


class EmulatorError(RuntimeError):
    """A launch that a GPU would refuse, or not come back from."""


class DecodeCall(ctypes.Structure):
    """csrc/cuda/multi_lora.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "base", "y", "s", "gate", "columns", "spans")),
        *((name, ctypes.c_int64) for name in ("x_step", "base_step", "rows", "features", "outputs", "ranks")),
        *((name, ctypes.c_int64) for name in ("experts", "gates")),
        *((name, ctypes.c_int32) for name in ("type", "expert_type", "a_aligned", "b_aligned")),
    ]


class RowMapCall(ctypes.Structure):
    """csrc/cuda/row_map.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("gate", "table", "needed", "counts")),
        *((name, ctypes.c_int64) for name in ("rows", "experts", "gates")),
    ]


class Fenced:
    """A tensor between two fences, all of it poison: NaN, or -1, which no number of a row map is."""

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        poison = float("nan") if dtype.is_floating_point else -1
        self.whole = torch.full((torch.Size(shape).numel() + 2 * FENCE,), poison, dtype=dtype)
        self.tensor = self.whole[FENCE : self.whole.numel() - FENCE].view(shape)
        self._before = self._fences().clone()

    def _fences(self) -> Tensor:
        return torch.cat([self.whole[:FENCE], self.whole[-FENCE:]])

    def check(self) -> Tensor:
        same = torch.allclose(self._fences(), self._before, rtol=0, atol=0, equal_nan=True)
        assert same, "the kernel wrote beside its output"
        return self.tensor.clone()


class HostKernels:
    """What csrc/cuda/multi_lora_op.cpp does, for tensors of the CPU."""

    active: HostKernels

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.emulator_problem.restype = ctypes.c_char_p
        self.library.emulator_launches.restype = ctypes.c_int64

    @property
    def launches(self) -> int:
        return int(self.library.emulator_launches())

    @contextmanager
    def order(self, kind: str, seed: int = 0) -> Iterator[None]:
        self.library.emulator_set_order(("forward", "reverse", "shuffled").index(kind), seed)
        try:
            yield
        finally:
            self.library.emulator_set_order(0, 0)

    @contextmanager
    def used(self) -> Iterator[None]:
        """The op runs these kernels in the block."""
        before, HostKernels.active = HostKernels.active, self
        try:
            yield
        finally:
            HostKernels.active = before

    def check(self, error: int) -> None:
        if error:
            raise EmulatorError(f"cudaError_t {error}: {self.library.emulator_problem().decode()}")

    def decode(
        self, x: Tensor, base: Tensor | None, gate: Tensor, columns: Tensor, spans: Tensor, outputs: int,
        expert_dtype: torch.dtype, a_aligned: bool, b_aligned: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        y = Fenced(x.shape[0], outputs, dtype=x.dtype)
        s = Fenced(x.shape[0], columns.shape[1], dtype=x.dtype)
        call = DecodeCall(
            x=x.data_ptr(), x_step=x.stride(0), base=None if base is None else base.data_ptr(),
            base_step=0 if base is None else base.stride(0), y=y.tensor.data_ptr(), s=s.tensor.data_ptr(),
            gate=gate.data_ptr(), columns=columns.data_ptr(), spans=spans.data_ptr(), rows=x.shape[0],
            features=x.shape[1], outputs=outputs, ranks=columns.shape[1], experts=gate.shape[1], gates=gate.shape[0],
            type=TYPES[x.dtype], expert_type=TYPES[expert_dtype], a_aligned=a_aligned, b_aligned=b_aligned,
        )  # fmt: skip
        self.check(self.library.dmole_cuda_decode(ctypes.byref(call), None))
        return y.check(), s.check()

    def row_map(self, gate: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        experts, tiles = gate.shape[1], -(-rows // 32)
        table = Fenced(3 + experts + 1 + 2 * rows * experts, dtype=torch.int32)
        needed = Fenced(tiles, -(-experts // 32), dtype=torch.int32)
        counts = Fenced(experts, tiles, dtype=torch.int32)
        call = RowMapCall(
            gate=gate.data_ptr(), table=table.tensor.data_ptr(), needed=needed.tensor.data_ptr(),
            counts=counts.tensor.data_ptr(), rows=rows, experts=experts, gates=gate.shape[0],
        )  # fmt: skip
        self.check(self.library.dmole_cuda_row_map(ctypes.byref(call), None))
        counts.check()
        return table.check(), needed.check()


def compiled(sources: Mapping[Path, Path], flags: Sequence[str]) -> None:
    """Object file <- source, where the object is not there yet."""
    for target, source in sources.items():
        if not target.exists():
            subprocess.run([*COMPILE, *flags, "-c", str(source), "-o", str(target)], check=True, timeout=300)


@pytest.fixture(scope="session")
def build_kernels(tmp_path_factory: pytest.TempPathFactory) -> BuildKernels:
    """(name, changes) -> the kernels with these changes in their sources."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile the CUDA kernels for the host: apt-get install g++")
    folder = tmp_path_factory.mktemp("cuda_on_host")
    shared = {folder / f"{path.stem}.o": path for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))}
    shared[folder / "emulator.o"] = EMULATOR / "emulator.cpp"

    def build(name: str, changes: Sequence[Change] = ()) -> HostKernels:
        csrc = ROOT / "csrc"
        objects = dict(shared)
        if changes:
            csrc = folder / name
            shutil.copytree(ROOT / "csrc", csrc)
            for path in sorted((csrc / "cuda").glob("*.cu*")):
                text = path.read_text(encoding="utf-8")
                for old, new in changes:
                    if text.count(old) == 1:
                        text = text.replace(old, new)
                        touched = path.stem if path.suffix == ".cu" else "multi_lora"
                        objects.pop(folder / f"{touched}.o", None)
                        objects[csrc / f"{touched}.o"] = csrc / "cuda" / f"{touched}.cu"
                path.write_text(text, encoding="utf-8")
            assert objects != shared, f"{name}: its text is not in the sources, or more than once"
        compiled(objects, [f"-I{csrc}", *SANITIZE])
        path = folder / f"{name}.so"
        subprocess.run(["g++", "-shared", *map(str, objects), *SANITIZE, "-o", str(path)], check=True, timeout=60)
        return HostKernels(path)

    return build


@pytest.fixture(scope="session")
def host(build_kernels: BuildKernels) -> Iterator[HostKernels]:
    """The kernels as they are, behind torch.ops.dmole_kernels.cuda_decode and cuda_row_map for tensors of the CPU."""
    HostKernels.active = build_kernels("intact", ())
    schemas = re.findall(r'library\.def\(\s*((?:"[^"]*"\s*)+)\)', (ROOT / "csrc/ops.cpp").read_text(encoding="utf-8"))
    library = torch.library.Library("dmole_kernels", "FRAGMENT")
    for schema in ("".join(re.findall(r'"([^"]*)"', text)) for text in schemas):
        if schema.startswith("cuda_") and cuda.MISSING:
            library.define(schema)
    library.impl("cuda_decode", lambda *arguments: HostKernels.active.decode(*arguments), "CPU")
    library.impl("cuda_row_map", lambda *arguments: HostKernels.active.row_map(*arguments), "CPU")
    yield HostKernels.active
    library._destroy()


@pytest.fixture
def cuda_on_cpu(host: HostKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend's lines in the tables, for the device on which the emulator runs."""
    monkeypatch.setitem(backend.BACKENDS, "cuda", ("cpu", "cuda"))
    monkeypatch.setitem(FORWARD, "cuda", cuda.multi_lora_forward)
    monkeypatch.setitem(BACKWARD, "cuda", cuda.multi_lora_backward)
