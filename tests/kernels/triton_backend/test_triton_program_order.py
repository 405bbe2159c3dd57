# SPDX-License-Identifier: Apache-2.0
"""Programs of a launch run in any order and give the same bits: one writer for each output, nothing handed on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.check_gpu.correctness import SEVERAL_BLOCKS
from dmole_kernels._lora_call import LoraCall
from dmole_kernels.testing import WORKLOADS, LoraInputs, make_inputs, poisoned_memory, run_kernels
from dmole_kernels.triton_backend.cases import every_launch
from dmole_kernels.triton_backend.fused_base import fused_base_forward
from dmole_kernels.triton_backend.grad_norm import (
    accumulate_gradient,
    accumulate_sketch,
    squared_norm_direct,
    squared_norm_ghost,
)
from dmole_kernels.triton_backend.launch import Launch
from dmole_kernels.triton_backend.multi_lora import multi_lora_backward, multi_lora_forward
from dmole_kernels.triton_backend.router_score import masked_max_pool, router_score_forward

BY_NAME = {workload.name: workload for workload in (*WORKLOADS, SEVERAL_BLOCKS)}


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def trained(inputs: LoraInputs) -> list[Tensor]:
    return list(run_kernels(multi_lora_forward, multi_lora_backward, inputs).values())


def fused() -> list[Tensor]:
    inputs = make_inputs(SEVERAL_BLOCKS)
    weight, bias = drawn((40, 136), (40,))
    return list(
        fused_base_forward(
            LoraCall(inputs.x, None, inputs.lora_a, inputs.lora_b, inputs.gate, inputs.scale, 0.0, False, None),
            weight,
            bias,
        )
    )


def norms() -> list[Tensor]:
    x, grad = drawn((3, 37, 19), (3, 37, 23))
    return [squared_norm_direct(x, grad), squared_norm_ghost(x, grad)]


def accumulated() -> list[Tensor]:
    x, grad, left, right, sketch, buffer = drawn((37, 40), (37, 23), (23, 40), (40, 17), (40, 17), (23, 40))
    accumulate_gradient(buffer, x, grad)
    accumulate_sketch(sketch, x, grad, left, right)
    return [buffer, sketch]


def routed() -> list[Tensor]:
    features, *weights, hidden = drawn((19, 37), (3, 21, 37), (3, 21), (3, 37, 21), (3, 37), (3, 7, 140))
    pooled = masked_max_pool(hidden, torch.ones(3, 7, dtype=torch.bool))
    return [router_score_forward(features, *weights, True), *pooled]


CALLS: dict[str, Callable[[], list[Tensor]]] = {
    "multi_lora": lambda: trained(make_inputs(BY_NAME["several_blocks"])),
    "multi_lora with masks": lambda: trained(make_inputs(BY_NAME["dropout_per_expert"])),
    "fused_base": fused,
    "norms": norms,
    "accumulated": accumulated,
    "router": routed,
}


@pytest.fixture
def expected(request: pytest.FixtureRequest) -> list[Tensor]:
    """Made before the programs are permuted."""
    with poisoned_memory():
        return CALLS[request.node.callspec.params["call"]]()


@pytest.mark.parametrize("call", CALLS)
def test_the_order_of_programs_changes_no_bit(
    call: str, expected: list[Tensor], permuted_programs: None
) -> None:  # fmt: skip
    with poisoned_memory():
        actual = CALLS[call]()
    assert all(torch.equal(one, two) for one, two in zip(actual, expected, strict=True))


def test_every_kernel_is_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls above launch every kernel that check-aot compiles, in several programs."""
    programs: dict[str, int] = {}

    def noted(launch: Launch) -> None:
        programs[launch.name] = max(launch.grid, programs.get(launch.name, 0))
        start(launch)

    start = Launch._start
    monkeypatch.setattr(Launch, "_start", noted)
    for call in CALLS.values():
        call()
    assert programs.keys() == {launch.name for _, launch in every_launch("sm_90")}
    assert min(programs.values()) > 1
