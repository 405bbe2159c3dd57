# SPDX-License-Identifier: Apache-2.0
"""
    python -m dmole_kernels tune [--output FILE] [--kernels shrink,expand] [--quick]

Measures, on the GPU at hand, the launch configurations that compile without spills and fit its shared memory, and
writes the fastest of each (kernel, element size) with the date and the device's name in the form of
`triton_backend/tuned.json`. Copy the file there to use it (then run check-aot --write); nothing is tuned at run time.

The score of a configuration is the sum over the rank classes (16, 32 and 64 packed columns) of its median time at one
number of rows: the choice must not depend on the number of rows of a call, or a sample's result would depend on the
rest of the batch. Kernels that read the flags of another are tuned after it, among the tiles that fit its tiles.
`--quick` tries two candidates of each. Without a GPU the command runs in Triton's interpreter on tiny shapes; such
times mean nothing, and the table rejects such a file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from dmole_kernels.triton_backend.cases import Case, Sizes, call_arguments, fused_launches, launches, other_launches
from dmole_kernels.triton_backend.configs import FLAGS_OF, TABLE, TUNED, Config, Line, misfits
from dmole_kernels.triton_backend.launch import Launch, interpreting, target_of

INTERPRETER = "interpreter: no GPU was used; times mean nothing"
BITS = ("16", "32")
FLUSHED_BYTES = 2**28  # written between two timed launches, more than the cache of any GPU
ROUNDS = 20

# The launches that each entry configures, by name; an accumulated gradient uses the entry of norm_direct.
LAUNCHES = {
    "shrink": "shrink",
    "expand": "expand",
    "fused_base": "fused_base",
    "shrink_gradient": "shrink_gradient",
    "weight_gradient": "weight_gradient",
    "input_gradient": "input_gradient",
    "norm_direct": "norm_direct",
    "norm_ghost": "norm_ghost",
    "sketch": "sketch_tile",
    "router_score": "router_score",
}
IN_ONE_SIZE = ("norm_direct", "norm_ghost", "sketch")  # always computed in 32 bits


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The time of one configuration in seconds; infinite, with the reason, where it does not run."""

    config: Config
    seconds: float
    reason: str = ""


def candidates(kernel: str, current: Config) -> list[Config]:
    """The entry of the table first, then its neighbours."""
    rows: tuple[int, ...] = (16, 32, 64)
    widths: tuple[int, ...] = (128,)
    depths: tuple[int, ...] = (0,)
    if kernel == "expand":
        rows, widths = (32, 64, 128), (64, 128, 256)
    elif kernel == "shrink_gradient":
        widths = (64, 128)
    elif kernel == "fused_base":
        rows, widths, depths = (32, 64, 128), (64, 128, 256), (16, 32, 64)
    elif kernel in ("norm_direct", "norm_ghost", "sketch", "router_score"):
        widths = (16, 32, 64)
    every = [
        Config(rows=r, width=w, depth=d, warps=warps, stages=stages)
        for r, w, d, warps, stages in product(rows, widths, depths, (4, 8), (1, 2, 3, 4))
    ]
    return [current, *(config for config in every if config != current)]


def tune(
    kernels: Sequence[str], *, device: str, most: int | None = None, deadline: float = math.inf,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:  # fmt: skip
    """A record for `tuned.json`: {target: {device, date, triton, kernels: {kernel: {bits: configuration}}}}.

    Args:
        most: candidates of each entry at most.
        deadline: `time.monotonic()` after which no further entry is started; the record holds the finished ones.
    """
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]

    target = target_of(torch.device(device))
    line = dict(TABLE[target])
    found: dict[str, dict[str, dict[str, int]]] = {}
    for kernel in kernels:
        for element, bits in enumerate(BITS):
            if (kernel in IN_ONE_SIZE and bits == "16") or time.monotonic() > deadline:
                continue
            trials = [
                _trial(kernel, element, config, line, device)
                for config in _fitting(kernel, element, line, kernels)[:most]
            ]
            best = min(trials, key=lambda trial: trial.seconds)
            if math.isinf(best.seconds):
                raise ValueError(
                    f"no configuration of {kernel} runs in {bits} bits: {trials[0].reason}; expected the table's to. "
                    f"Run check-aot for this target."
                )
            line = _with(line, kernel, element, best.config)
            found.setdefault(kernel, {})[bits] = asdict(best.config)
            left_out = sum(math.isinf(trial.seconds) for trial in trials)
            say(
                f"{kernel}, {bits} bits: {best.config}, {best.seconds * 1e6:.1f} us against "
                f"{trials[0].seconds * 1e6:.1f} of the table's; {len(trials)} tried, {left_out} do not fit"
            )
    name = INTERPRETER if interpreting() else torch.cuda.get_device_name(device)
    return {
        target: {
            "device": name,
            "date": datetime.date.today().isoformat(),
            "triton": triton.__version__,
            "kernels": found,
        }
    }


def _with(line: Line, kernel: str, element: int, config: Config) -> dict[str, tuple[Config, Config]]:
    pair = list(line[kernel])
    pair[element] = config
    return {**line, kernel: (pair[0], pair[1])}


def _fitting(kernel: str, element: int, line: Line, kernels: Sequence[str]) -> list[Config]:
    """The candidates whose tiles fit those of kernels tuned before it, and of those not tuned at all."""
    later = kernels[kernels.index(kernel) + 1 :]
    settled = {name: pair for name, pair in line.items() if name not in later}
    return [
        config
        for config in candidates(kernel, line[kernel][element])
        if not any(misfits(_with(settled, kernel, element, config)))
    ]


def _trial(kernel: str, element: int, config: Config, line: Line, device: str) -> Trial:
    from triton.runtime.errors import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        OutOfResources,
        PTXASError,
    )

    # Kernels that read its flags are not run, but the line must be one that launches can be made of.
    trial_line = {
        name: tuple(replace(c, rows=max(c.rows, config.rows)) if FLAGS_OF.get(name) == kernel else c for c in pair)
        for name, pair in _with(line, kernel, element, config).items()
    }
    seconds = 0.0
    try:
        for before, launch in _measured(kernel, element, trial_line, device):  # type: ignore[arg-type]
            for needed in before:
                needed.run()
            launch.run()
            spilled = 0 if interpreting() else launch.spills()
            if spilled:
                return Trial(config=config, seconds=math.inf, reason=f"{spilled} registers spilled")
            seconds += _seconds(launch, device)
    except (OutOfResources, PTXASError) as error:
        return Trial(config=config, seconds=math.inf, reason=str(error))
    return Trial(config=config, seconds=seconds)


def _measured(kernel: str, element: int, line: Line, device: str) -> Iterator[tuple[list[Launch], Launch]]:
    """The launches that judge a configuration, each with those that write what it reads."""
    dtype = (torch.bfloat16, torch.float32)[element]
    tiny = interpreting()
    if LAUNCHES[kernel] in ("norm_direct", "norm_ghost", "sketch_tile", "router_score"):
        sizes = Sizes(samples=2, tokens=17, width=24, sketch=8, tasks=2, hidden=8) if tiny else Sizes()
        made = [launch for _, launch in other_launches(line, sizes=sizes, device=device)]
        for launch in made:
            if launch.name == LAUNCHES[kernel] and launch.config == line[kernel][element]:
                yield [], launch
        return
    for ranks in ((16,), (16, 16), (16,) * 4):
        case = Case(name="", ranks=ranks, dtype=dtype)
        if tiny:
            case = replace(case, rows=24, in_features=40, out_features=24, samples=2)
        tensors = call_arguments(case, device)
        if kernel == "fused_base":
            made = fused_launches(case, line, tensors)
        else:
            made = [launch for direction in launches(case, line, tensors) for launch in direction]
        place = next(i for i, launch in enumerate(made) if launch.name == LAUNCHES[kernel])
        # `weight_gradient` reads S too, so what comes before runs as a whole.
        before = made[:place] if kernel in FLAGS_OF else []
        yield before, made[place]


def _seconds(launch: Launch, device: str) -> float:
    """Median time; on a GPU between events, with the cache flushed before."""
    if interpreting():
        start = time.perf_counter()
        launch.run()
        return time.perf_counter() - start
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
    times = []
    for _ in range(ROUNDS):
        flushed.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        launch.run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return float(statistics.median(times))


def main(arguments: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(prog="python -m dmole_kernels tune", description="Times launch configurations.")
    parser.add_argument("--output", type=Path, default=Path(TUNED.name), help="the JSON file to write")
    parser.add_argument("--kernels", default=",".join(LAUNCHES), help="names from the table, separated by commas")
    parser.add_argument("--quick", action="store_true", help="two candidates of each")
    options = parser.parse_args(arguments)
    chosen = options.kernels.split(",")
    unknown = [name for name in chosen if name not in LAUNCHES]
    if unknown:
        raise ValueError(
            f"--kernels has {', '.join(unknown)}; expected some of {', '.join(LAUNCHES)}. Check the names."
        )
    device = "cpu" if interpreting() else "cuda"
    if interpreting():
        print(INTERPRETER)
    kernels = [name for name in LAUNCHES if name in chosen]
    record = tune(kernels, device=device, most=2 if options.quick or interpreting() else None)
    kept = json.loads(TUNED.read_text(encoding="utf-8"))
    options.output.write_text(json.dumps(kept | record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{options.output} written. To use it, copy it to {TUNED}, and run check-aot --write.")
    return 0
