# SPDX-License-Identifier: Apache-2.0
"""Deliberately broken CUDA kernels: one text of their sources changed, each must be caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dmole_kernels import RowMap, cpu, cuda
from dmole_kernels._lora_call import LoraCall
from dmole_kernels.testing import Workload, expected_errors, judge, make_inputs, multi_lora_loop, rejected

# Name -> what stands in csrc/cuda, and what the broken kernel has there.
BROKEN_DECODE = {
    "no_barrier_between_the_warps_sums": ("  __syncthreads();\n  if (thread", "  if (thread"),
    "gate_of_another_row": ("row / (call.rows / call.gates) * call.experts + expert", "expert"),
    "tail_of_the_features_dropped": ("i < left ? to_float(from[i]) : 0.0f", "0.0f"),
    "features_past_one_stride_dropped": ("d < call.features; d +=", "d < 1024; d +="),
    "last_warp_left_out": ("w < kShrinkWarps; ++w", "w < kShrinkWarps - 1; ++w"),
    "half_a_warp_summed": ("distance = kWarp / 2; distance > 0", "distance = kWarp / 4; distance > 0"),
    "last_row_left_out": ("lane < call.rows && gate_of", "lane < call.rows - 1 && gate_of"),
    "sums_in_the_narrow_type": (
        "sum[row] = fmaf(a_chunk[i], x_chunk[i], sum[row])",
        "sum[row] = to_float(from_float<__nv_bfloat16>(fmaf(a_chunk[i], x_chunk[i], sum[row])))",
    ),
    "s_of_unused_experts_unwritten": ("if (thread < call.rows) {", "if (thread < call.rows && has(needing, thread)) {"),
    "experts_past_the_first_warp_mixed_up": ("call, row, output, begin + place)", "call, row, output, place)"),
    "gate_as_a_switch": ("__shfl_sync(kWholeWarp, gate, place)", "1.0f"),
    "first_expert_alone": ("open != 0u; open &= open - 1u", "open != 0u; open = 0u"),
    "scale_forgotten": ("static_cast<float>(__longlong_as_double(field(call, kScale, first))) * sum", "sum"),
    "outputs_leave_before_the_warp_meets": (
        "  float delta = 0.0f;\n",
        "  float delta = 0.0f;\n  if (output >= call.outputs) return;\n",
    ),
    "last_output_unwritten": ("if (output >= call.outputs) return;", "if (output >= call.outputs - 1) return;"),
    "one_output_too_many": ("if (output >= call.outputs) return;", "if (output >= call.outputs + 1) return;"),
    "last_columns_block_missing": ("(call.outputs + kExpandThreads - 1)", "call.outputs"),
}  # fmt: skip
BROKEN_ROW_MAP = {
    "no_barrier_between_counts_and_starts": ("  __syncthreads();\n  if (warp", "  if (warp"),
    "own_lane_counted": ("(1u << lane) - 1u", "(2u << lane) - 1u"),
    "tiles_before_forgotten": ("call.counts[e * tiles + tile] + __popc", "__popc"),
    "last_flag_forgotten": ("(e == last ? dmole::cpu::kLast : 0)", "0"),
    "first_flag_kept": ("    first = 0;\n", ""),
    "scan_without_carry": ("total += __shfl_sync", "total = __shfl_sync"),
    "rows_past_the_end": ("return row < call.rows ? call.gate", "return true ? call.gate"),
    "experts_of_the_second_word": ("bits |= 1u << i", "bits |= 1u << (i % 31)"),
}  # fmt: skip
WORKLOADS = (
    Workload(name="ragged", leading=(13, 1), in_features=2083, out_features=131, ranks=(3, 16)),
    Workload(name="forty", leading=(5, 3), in_features=64, out_features=64, ranks=(8,) * 40, pattern="top2"),
)


def decode_faults(kernels: Any) -> list[str]:
    """What the error rule, the emulator and the order of the threads have against these kernels."""
    faults: list[str] = []
    for workload in WORKLOADS:
        inputs = make_inputs(workload, torch.float32)

        def run(kind: str, call: LoraCall) -> tuple[Tensor, Tensor]:
            with kernels.used(), kernels.order(kind):
                return cuda.multi_lora_forward(call)

        try:
            (y, s_NR), (reversed_y, _) = run("forward", inputs.call()), run("reverse", inputs.call())
        except (RuntimeError, AssertionError) as error:
            faults.append(str(error))
            continue
        truth = {"delta": multi_lora_loop(inputs.to(torch.float64))}
        faults += rejected(judge({"delta": y}, expected_errors(inputs), truth))
        if not torch.equal(y, reversed_y):
            faults.append("the order of the threads changes y")
        if s_NR.isnan().any():
            faults.append("S is not whole")
    return faults


def row_map_faults(kernels: Any) -> list[str]:
    faults: list[str] = []
    generator = torch.Generator().manual_seed(0)
    for gates, rows, experts in ((1200, 1200, 40), (5, 45, 70)):
        gate = (torch.rand(gates, experts, generator=generator) < 0.3).float()
        expected = RowMap(gate, rows).table
        used = gate.repeat_interleave(rows // gates, 0) != 0
        for kind in ("forward", "reverse"):
            try:
                with kernels.used(), kernels.order(kind):
                    table, needed = cuda.row_map(gate, rows)
            except (RuntimeError, AssertionError) as error:
                faults.append(str(error))
                continue
            if not torch.equal(table[: expected.numel()], expected):
                faults.append(f"the numbers are others, {kind}")
            bits = needed[:, torch.arange(experts) // 32] >> (torch.arange(experts) % 32) & 1
            tiles = torch.stack([tile.any(0) for tile in used.split(32)])
            if not torch.equal(bits != 0, tiles):
                faults.append(f"tiles need others, {kind}")
    return faults


NEEDS_CPU_ROW_MAP = pytest.mark.skipif(cpu.EXTENSION is None, reason=f"no compiled extension: {cpu.MISSING}")


def check_caught(
    name: str, change: tuple[str, str], build: Callable[..., Any], faults: Callable[[Any], list[str]]
) -> None:
    assert faults(build(name, [change])), f"{name} was not caught"


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("name", BROKEN_DECODE)
def test_a_broken_decode_kernel_is_caught(name: str, build_kernels: Any) -> None:
    check_caught(name, BROKEN_DECODE[name], build_kernels, decode_faults)


@NEEDS_CPU_ROW_MAP
@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("name", BROKEN_ROW_MAP)
def test_a_broken_row_map_kernel_is_caught(name: str, build_kernels: Any) -> None:
    check_caught(name, BROKEN_ROW_MAP[name], build_kernels, row_map_faults)


@NEEDS_CPU_ROW_MAP
def test_the_kernels_themselves_have_no_faults(host: Any) -> None:
    assert decode_faults(host) == []
    assert row_map_faults(host) == []
