# SPDX-License-Identifier: Apache-2.0
"""The experiment: base product and experts in one launch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.check_gpu.correctness import SEVERAL_BLOCKS
from dmole_kernels import ExpertGates, MultiLoRALinear
from dmole_kernels._fused_linear import fused_linear
from dmole_kernels._lora_call import LoraCall
from dmole_kernels.testing import (
    WORKLOADS,
    LoraInputs,
    Workload,
    expected_errors,
    judge,
    make_inputs,
    multi_lora_loop,
    poisoned_memory,
    rejected,
)
from dmole_kernels.triton_backend.cases import Case, fused_launches
from dmole_kernels.triton_backend.configs import TARGETS
from dmole_kernels.triton_backend.fused_base import fused_base_forward

pytestmark = pytest.mark.usefixtures("triton_on_cpu")


@pytest.mark.parametrize("workload", (*WORKLOADS, SEVERAL_BLOCKS), ids=lambda workload: workload.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_rule_on_the_experts_part(workload: Workload, dtype: torch.dtype) -> None:
    draws = max(4, 16 // max(1, workload.leading[0])) if dtype == torch.float32 else 1
    kinds: tuple[list[Tensor], list[Tensor]] = ([], [])
    expected = 0.0
    for draw in range(draws):
        inputs = make_inputs(workload, dtype, draw)
        weight = torch.zeros(workload.out_features, workload.in_features, dtype=dtype)
        with poisoned_memory():
            y, _ = fused_base_forward(inputs.call(), weight, None)
        kinds[0].append(y)
        expected = max(expected, expected_errors(inputs)["delta"])
        kinds[1].append(multi_lora_loop(inputs.to(torch.float64)))
    actual, truth = ({"delta": torch.stack(kind)} for kind in kinds)
    assert not rejected(judge(actual, {"delta": expected}, truth))


def with_base(inputs: LoraInputs, weight: Tensor, bias: Tensor, x: Tensor, gate: Tensor, *experts: Tensor) -> Tensor:
    count = len(inputs.scale)
    return fused_linear(
        x, weight, bias, experts[:count], experts[count:], gate, inputs.scale, dropout=inputs.dropout, seed=inputs.seed
    )


def test_gradcheck_with_a_base_and_dropout() -> None:
    inputs = make_inputs(
        Workload(name="", leading=(2, 2), in_features=3, out_features=2, ranks=(1, 2), dropout=0.4), torch.float64
    )
    weight, bias = (
        torch.randn(*s, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) for s in ((2, 3), (2,))
    )
    tensors = [t.detach().requires_grad_() for t in (inputs.x, inputs.gate, *inputs.lora_a, *inputs.lora_b)]
    assert torch.autograd.gradcheck(partial(with_base, inputs, weight, bias), tensors, fast_mode=True)


def layer(fuse_base: bool) -> tuple[MultiLoRALinear, ExpertGates]:
    torch.manual_seed(0)
    gates = ExpertGates()
    made = MultiLoRALinear(nn.Linear(24, 20), gates=gates, dropout=0.2, backend="triton", fuse_base=fuse_base)
    for name, rank in (("films", 3), ("charts", 5)):
        made.bank.add(name, rank, alpha=2.0 * rank)
        nn.init.normal_(made.bank.expert(name).lora_b)
    return made, gates


def test_a_layer_with_the_flag_gives_what_it_gives_without() -> None:
    results = []
    for fuse_base in (False, True):
        made, gates = layer(fuse_base)
        x = torch.randn(3, 5, 24, requires_grad=True)
        with gates.use(torch.tensor([[1.0, 0.0], [0.5, 2.0], [0.0, 1.0]]), ["films", "charts"]):
            y = made(x)
            y.square().sum().backward()
        assert x.grad is not None
        results.append([y.detach(), x.grad, *(p.grad for p in made.bank.parameters() if p.grad is not None)])
    assert len(results[0]) == 2 + 4
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_a_compiled_layer_with_the_flag_is_refused() -> None:
    made, gates = layer(True)
    with gates.use(torch.ones(1, 2), ["films", "charts"]):
        compiled = torch.compile(made, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match="expected eager mode, it is no registered op. Leave fuse_base off"):
            compiled(torch.randn(1, 24))
    torch._dynamo.reset()


def test_what_it_cannot_do_is_said() -> None:
    inputs = make_inputs(WORKLOADS[0])
    experts = (inputs.lora_a, inputs.lora_b, inputs.gate, inputs.scale)
    weight = torch.zeros(8, 8)
    with pytest.raises(ValueError, match="fused_linear got backend 'reference'; expected 'triton'"):
        fused_linear(inputs.x, weight, None, *experts, backend="reference")
    with pytest.raises(ValueError, match=r"weight has shape \(7, 8\) and bias None; expected \(8, 8\)"):
        fused_linear(inputs.x, weight[1:], None, *experts)
    with pytest.raises(ValueError, match="weight or bias requires grad; expected both frozen"):
        fused_linear(inputs.x, weight.requires_grad_(), None, *experts)


@pytest.mark.parametrize("target", TARGETS)
def test_bytes_are_the_base_s_and_36_mb(target: str) -> None:
    case = Case(name="", ranks=(64,), expert_dtype=torch.bfloat16)
    launched = fused_launches(case, target)
    assert [launch.name for launch in launched] == ["shrink", "fused_base"]
    n, d, p = case.rows, case.in_features, case.out_features
    added = sum(launch.bytes for launch in launched) - 2 * (n * d + d * p + n * p)
    assert round(added / 1e6) == 36


def test_the_base_alone_is_what_a_gate_of_zero_leaves() -> None:
    inputs = make_inputs(SEVERAL_BLOCKS)
    weight = torch.randn(40, 136, generator=torch.Generator().manual_seed(3))
    arguments = (inputs.lora_a, inputs.lora_b, torch.zeros_like(inputs.gate), inputs.scale, 0.0, False, None)
    with poisoned_memory():
        y, shrunk = fused_base_forward(LoraCall(inputs.x, None, *arguments, every_column=False), weight, None)
    torch.testing.assert_close(y, F.linear(inputs.x, weight), rtol=1e-5, atol=1e-4)
    assert not shrunk.any()
