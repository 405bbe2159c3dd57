# SPDX-License-Identifier: Apache-2.0
"""Runs the four steps one after another, each with its time budget, and writes the summary of their results."""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.benchmark import check_and_time, report
from benchmarks.check_gpu import correctness, roofline, sanitizer, timed_cases
from benchmarks.records import Row, write_rows
from dmole_kernels import explain_backend
from dmole_kernels._tune import INTERPRETER, tune
from dmole_kernels.testing import triton_on_cpu
from dmole_kernels.triton_backend.configs import TUNED
from dmole_kernels.triton_backend.launch import interpreting

# Seconds of each step; a check that is running when they are over is finished.
BUDGETS = {"correctness": 280.0, "sanitizer": 110.0, "tuner": 60.0, "benchmark": 100.0}
TUNED_KERNELS = ("shrink", "expand")
BENCHMARK_SECONDS = 3.0
OURS = (*timed_cases.OURS, "cuda")

Say = Callable[..., object]  # a line of text, and a style of rich's
StepResult = dict[str, Any]


def check_correctness(every: Iterator[correctness.Check], seconds: float, say: Say) -> StepResult:
    end = time.monotonic() + seconds
    wrong: dict[str, list[str]] = {}
    done, left_out = 0, []
    for check in every:
        if time.monotonic() > end:
            left_out.append(check.name)
            continue
        try:
            complaints = check.complaints()
        except Exception as error:  # a kernel that raises is a failed check; the others still run
            complaints = [f"{type(error).__name__}: {error}"]
        done += 1
        if complaints:
            wrong[check.name] = complaints
            say(f"WRONG {check.name}: {complaints[0]}", "red")
    say(f"correctness: {done} checks, {len(wrong)} wrong, {len(left_out)} left out for lack of time")
    return {"failed": bool(wrong), "checks": done, "wrong": wrong, "left_out": left_out}


def run_sanitizer(seconds: float, say: Say, *, gpu: bool) -> StepResult:
    verdicts = sanitizer.sanitize(seconds, gpu=gpu)
    for verdict in verdicts:
        say(f"compute-sanitizer {verdict.tool}: {verdict.state}{verdict.about and ': '}{verdict.about}")
    failed = any(verdict.state == "wrong" for verdict in verdicts)
    return {"failed": failed, "tools": [asdict(verdict) for verdict in verdicts]}


def run_tuner(output: Path, seconds: float, say: Say, *, gpu: bool) -> StepResult:
    record = tune(
        TUNED_KERNELS, device="cuda" if gpu else "cpu", most=6 if gpu else 2, deadline=time.monotonic() + seconds,
        say=say,
    )  # fmt: skip
    output.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return record


def run_benchmark(output: Path, seconds: float, say: Say, *, gpu: bool) -> StepResult:
    """benchmark.csv and roofline.png; a provider whose results are wrong has no row."""
    end = time.monotonic() + seconds
    machine = timed_cases.machine(gpu=gpu)
    rows: list[Row] = []
    found: list[roofline.Point] = []
    wrong: dict[str, dict[str, Sequence[str]]] = {}
    left_out = []
    for benchmark in timed_cases.benchmarks(gpu=gpu):
        name = f"{benchmark.case} {benchmark.direction}"
        if time.monotonic() > end:
            left_out.append(name)
            continue
        outcome = check_and_time(
            benchmark, seconds=BENCHMARK_SECONDS if gpu else 0.0, min_rounds=5 if gpu else 1, memory=gpu
        )
        rows += outcome.rows(machine)
        found += roofline.points(outcome)
        if outcome.wrong:
            wrong[name] = dict(outcome.wrong)
        for line in report(outcome):
            say(line)
        write_rows(output / "benchmark.csv", [*machine.measured_rows(), *rows])
    threads = torch.get_num_threads()
    dtype = torch.bfloat16 if gpu else torch.float32
    roofline.draw(
        output / "roofline.png", found, peak=machine.peak(dtype, threads), bandwidth=machine.bandwidth(threads),
        title=machine.name if gpu else INTERPRETER,
    )  # fmt: skip
    failed = any(provider in OURS for providers in wrong.values() for provider in providers)
    return {"failed": failed, "rows": len(rows), "wrong": wrong, "left_out": left_out, "machine": machine.name,
            "versions": machine.versions, "commit": machine.commit}  # fmt: skip


def check_gpu(output: Path, say: Say) -> bool:
    """Runs the steps, writes their files and summary.json; True when nothing is wrong."""
    gpu = not interpreting()
    device = "cuda" if gpu else "cpu"
    start = time.monotonic()
    label = torch.cuda.get_device_name() if gpu else INTERPRETER
    say(label, "bold")
    say(explain_backend())
    output.mkdir(parents=True, exist_ok=True)
    with nullcontext() if gpu else triton_on_cpu():
        every = correctness.checks(device, tiny=not gpu)
        steps = {
            "correctness": _finished(lambda: check_correctness(every, BUDGETS["correctness"], say)),
            "sanitizer": _finished(lambda: run_sanitizer(BUDGETS["sanitizer"], say, gpu=gpu)),
            "tuner": _finished(lambda: run_tuner(output / TUNED.name, BUDGETS["tuner"], say, gpu=gpu)),
            "benchmark": _finished(lambda: run_benchmark(output, BUDGETS["benchmark"], say, gpu=gpu)),
        }
    for name, result in steps.items():
        if "error" in result:
            say(f"{name} failed: {result['error']}", "red")
    passed = not any(result.get("error") or result.get("failed") for result in steps.values())
    summary = {"device": label, "passed": passed, "seconds": round(time.monotonic() - start, 1), **steps}
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    say(f"{'passed' if passed else 'FAILED'} in {summary['seconds']} s: {output}/summary.json",
        "green" if passed else "red")  # fmt: skip
    return passed


def _finished(run: Callable[[], StepResult]) -> StepResult:
    """The result of the step; an exception becomes its "error", and the other steps still run."""
    try:
        return run()
    except Exception:
        return {"error": traceback.format_exc()}


def main(arguments: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check_gpu", description="Checks the GPU kernels.")
    parser.add_argument("--output", type=Path, default=Path("check_gpu"), help="folder for what it writes")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False)

    return 0 if check_gpu(options.output, say) else 1
