# SPDX-License-Identifier: Apache-2.0
"""What tests and benchmarks share: workloads, the oracle, the error rule, and the conditions of a test."""

from dmole_kernels._argument_checks import dtype_name
from dmole_kernels._rounding import product_error
from dmole_kernels.testing.conditions import poisoned_memory, threads, triton_on_cpu
from dmole_kernels.testing.error_rule import (
    FACTOR,
    Verdict,
    expected_errors,
    few_roundings,
    judge,
    judge_run,
    rejected,
    worst_row_error,
)
from dmole_kernels.testing.oracle import (
    Results,
    multi_lora_loop,
    multi_lora_op,
    run_autograd,
    run_kernels,
    run_reference,
)
from dmole_kernels.testing.workloads import WORKLOADS, LoraInputs, Workload, make_inputs

__all__ = [
    "FACTOR",
    "WORKLOADS",
    "LoraInputs",
    "Results",
    "Verdict",
    "Workload",
    "dtype_name",
    "expected_errors",
    "few_roundings",
    "judge",
    "judge_run",
    "make_inputs",
    "multi_lora_loop",
    "multi_lora_op",
    "poisoned_memory",
    "product_error",
    "rejected",
    "run_autograd",
    "run_kernels",
    "run_reference",
    "threads",
    "triton_on_cpu",
    "worst_row_error",
]
