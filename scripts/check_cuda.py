# SPDX-License-Identifier: Apache-2.0
"""
    python scripts/check_cuda.py [--write]

Compiles the kernels of csrc/cuda with nvcc for every target, warnings as errors and without a GPU, and compares what
the assembler reports with csrc/cuda/compiled.json: registers, shared memory, spills. `--write` replaces the file, after
a change that is meant. With another nvcc than the file's only the limits are checked.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "csrc" / "cuda" / "compiled.json"
TARGETS = ("sm_80", "sm_90a", "sm_100a")
STRICT = ("-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror", "-Xptxas", "-v")
# Of every target: a block's registers, and the shared memory that it may have without asking.
MOST_REGISTERS, MOST_SHARED = 65536, 49152
THREADS = {"shrink": 128, "expand": 64, "count_rows": 128, "place_experts": 1024, "fill_pairs": 128}
Entry = dict[str, int]


def nvcc_version() -> str:
    text = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    (found,) = re.findall(r"release \S+, V(\S+)", text)
    return str(found)


def compiled(target: str) -> dict[str, Entry]:
    """ "target kernel<types>" -> what ptxas says of it."""
    entries: dict[str, Entry] = {}
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        with tempfile.TemporaryDirectory() as folder:
            command = ["nvcc", "-cubin", f"-arch={target}", f"-I{ROOT / 'csrc'}", *STRICT, str(source)]
            done = subprocess.run([*command, "-o", f"{folder}/kernels.cubin"], capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{source.name} for {target}: {done.stderr}")
        entries |= {f"{target} {name}": entry for name, entry in reported(done.stderr).items()}
    return entries


def reported(text: str) -> dict[str, Entry]:
    """What `ptxas -v` says, by kernel."""
    entries = {}
    for part in text.split("Compiling entry function '")[1:]:
        mangled = part.partition("'")[0]
        stack, stores, loads = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", part)[:3]
        (registers,) = re.findall(r"Used (\d+) registers", part)
        shared = re.findall(r"(\d+) bytes smem", part)
        entries[readable(mangled)] = {
            "registers": int(registers),
            "shared": int(shared[0]) if shared else 0,
            "spills": int(stack) + int(stores) + int(loads),
        }
    return entries


def readable(mangled: str) -> str:
    """shrink<__half, float> of its mangled name."""
    name = subprocess.run(["c++filt", mangled], check=True, capture_output=True, text=True).stdout.strip()
    return name.partition("(anonymous namespace)::")[2].partition("(")[0]


def broken_limits(entries: dict[str, Entry]) -> Iterator[str]:
    for key, entry in entries.items():
        threads = THREADS[key.split(" ")[1].partition("<")[0]]
        if entry["spills"]:
            yield f"{key}: {entry['spills']} bytes spilled or on the stack; expected none. Keep fewer numbers at once."
        if entry["registers"] * threads > MOST_REGISTERS:
            yield f"{key}: {entry['registers']} registers x {threads} threads; expected at most {MOST_REGISTERS}."
        if entry["shared"] > MOST_SHARED:
            yield f"{key}: {entry['shared']} bytes of shared memory; expected at most {MOST_SHARED}."


def differences(entries: dict[str, Entry], recorded: dict[str, Entry]) -> Iterator[str]:
    for key in sorted(entries.keys() | recorded.keys()):
        if entries.get(key) != recorded.get(key):
            yield f"{key}: got {entries.get(key)}, expected {recorded.get(key)}. Run with --write if that is meant."


def main(arguments: Sequence[str]) -> int:
    if list(arguments) not in ([], ["--write"]):
        raise SystemExit(f"check_cuda got {list(arguments)}; expected nothing or --write. Drop the others.")
    for tool, package in (("nvcc", "the CUDA toolkit"), ("c++filt", "binutils")):
        if shutil.which(tool) is None:
            raise SystemExit(f"check_cuda needs {tool}, which is not on PATH; install {package}.")
    version = nvcc_version()
    entries: dict[str, Entry] = {}
    for target in TARGETS:
        entries |= compiled(target)
    problems = list(broken_limits(entries))
    if list(arguments) == ["--write"]:
        text = json.dumps({"nvcc": version, "kernels": entries}, indent=1, sort_keys=True)
        RECORD.write_text(text + "\n", encoding="utf-8")
    else:
        record = json.loads(RECORD.read_text(encoding="utf-8"))
        if record["nvcc"] == version:
            problems += differences(entries, record["kernels"])
        else:
            print(f"the record is of nvcc {record['nvcc']}, this is {version}: only the limits are checked")
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"check_cuda: {len(entries)} kernels, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
