# SPDX-License-Identifier: Apache-2.0
"""Launches and bytes of a layer, counted from the launches themselves, against the floors of the split form."""

from __future__ import annotations

import pytest
import torch

from dmole_kernels.triton_backend.cases import Case, launches
from dmole_kernels.triton_backend.configs import TARGETS
from dmole_kernels.triton_backend.launch import Launch


def forward_floor(case: Case) -> int:
    """b (N d + R d + N R) + b (N R + p R + 2 N p)."""
    n, d, p, r = case.rows, case.in_features, case.out_features, sum(case.ranks)
    return case.dtype.itemsize * (n * d + r * d + n * r + n * r + p * r + 2 * n * p)


def backward_floor(case: Case) -> int:
    """dS, dB, dA and dx, each reading its operands and writing its result once; dx is added to the base's outside."""
    n, d, p, r = case.rows, case.in_features, case.out_features, sum(case.ranks)
    ds, db, da = n * p + p * r + n * r, n * p + n * r + p * r, n * r + n * d + r * d
    return case.dtype.itemsize * (ds + db + da + n * r + r * d + n * d)


def total(launched: list[Launch]) -> int:
    return sum(launch.bytes for launch in launched)


EXPERTS = {1: (64,), 4: (16,) * 4, 16: (4,) * 16, 64: (1,) * 64}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("experts", EXPERTS)
def test_launches_and_bytes_of_a_square_layer(experts: int, target: str) -> None:
    case = Case(name="", ranks=EXPERTS[experts], expert_dtype=torch.bfloat16)
    forward, backward = launches(case, target)
    assert [launch.name for launch in forward] == ["shrink", "expand"]
    assert [launch.name for launch in backward][:2] == ["shrink_gradient", "weight_gradient"]
    assert len(backward) <= 4
    assert total(forward) <= 1.1 * forward_floor(case)
    assert total(backward) <= 1.1 * backward_floor(case)


def test_the_floors_are_the_design_s_numbers() -> None:
    """103 MB forward; 172 MB backward when adding dx to the base's (2 N d more reads and writes, N d of it ours)."""
    case = Case(name="", ranks=(64,))
    assert round(forward_floor(case) / 1e6) == 103
    assert round((backward_floor(case) + case.dtype.itemsize * case.rows * case.in_features) / 1e6) == 172


@pytest.mark.parametrize("gate", ["sample", "token"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_bytes_and_launches_do_not_depend_on_the_number_of_experts(gate: str, dropout: float) -> None:
    counts = []
    for ranks in EXPERTS.values():
        case = Case(
            name="", ranks=ranks, expert_dtype=torch.bfloat16, gate=gate, dropout=dropout, need_gate=True  # type: ignore[arg-type]
        )  # fmt: skip
        forward, backward = launches(case, "sm_90")
        assert (len(forward), len(backward)) == (2, 4)
        counts.append(total(forward) + total(backward))
    # The gates themselves are [rows or samples, experts]: 4 bytes each, read by five launches.
    gates = 6 * 4 * 4096 * 64 if gate == "token" else 6 * 4 * 8 * 64
    assert max(counts) - min(counts) <= gates + 4096


def test_frozen_experts_write_nothing() -> None:
    case = Case(name="", ranks=(16,) * 4, frozen=(0, 1, 2))
    _, backward = launches(case, "sm_90")
    writes = next(launch for launch in backward if launch.name == "weight_gradient").writes
    splits = next(launch for launch in backward if launch.name == "weight_gradient").arguments["splits"]
    assert sum(writes.values()) == splits * 16 * (4096 + 4096) * 4
