# SPDX-License-Identifier: Apache-2.0
"""
    python -m benchmarks.run --suite multi_lora --output benchmarks/results/multi_lora.csv [--only 'decode_*']

Runs one suite and writes its CSV (rewritten after every case, so that a stopped run keeps what it has). Exits with 1 if
a provider of this package was wrong in any case.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks import grad_norm_suite, linear_suite, lora_suite, proxy_suite, router_suite
from benchmarks.benchmark import Benchmark, check_and_time, report
from benchmarks.lora_providers import cpu_backends
from benchmarks.machine import Machine, this_machine
from benchmarks.records import Row, write_rows

SUITES: dict[str, Callable[[str], Iterator[Benchmark]]] = {
    "multi_lora": lora_suite.benchmarks,
    "linear": linear_suite.benchmarks,
    "grad_norm": grad_norm_suite.benchmarks,
    "router": router_suite.benchmarks,
    "proxy": proxy_suite.benchmarks,
}


def run_benchmarks(
    benchmarks: Iterator[Benchmark], machine: Machine, output: Path, *, seconds: float,
    say: Callable[[str], object] = print,
) -> bool:  # fmt: skip
    """True when none of this package's own providers was wrong."""
    rows: list[Row] = []
    right = True
    own = cpu_backends()
    for benchmark in benchmarks:
        outcome = check_and_time(benchmark, seconds=seconds)
        rows += outcome.rows(machine)
        right = right and not any(provider.startswith(own) for provider in outcome.wrong)
        for line in report(outcome):
            say(line)
        write_rows(output, [*machine.measured_rows(), *rows])
    return right


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--suite", required=True, choices=SUITES)
    parser.add_argument("--output", required=True, type=Path, help="the CSV to write")
    parser.add_argument("--only", default="*", help="cases whose name matches, such as 'decode_*'")
    parser.add_argument("--seconds", type=float, default=10.0, help="timing budget of a case; five rounds at least")
    options = parser.parse_args(arguments)
    machine = this_machine()
    print(f"{machine.name}\n{machine.versions}\ncommit {machine.commit}", flush=True)
    right = run_benchmarks(
        SUITES[options.suite](options.only), machine, options.output, seconds=options.seconds,
        say=lambda line: print(line, flush=True),
    )  # fmt: skip
    print("\n".join(machine.describe()))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
