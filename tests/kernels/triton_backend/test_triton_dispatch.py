# SPDX-License-Identifier: Apache-2.0
"""The kernels behind the registered op: its derivatives by gradcheck and the op by opcheck, as for every backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dmole_kernels.testing import LoraInputs, Workload, make_inputs, multi_lora_op


@pytest.mark.usefixtures("triton_on_cpu")
@pytest.mark.parametrize("per_expert", [False, True], ids=["shared", "per_expert"])
def test_gradcheck_of_x_a_b_and_gate_with_dropout(per_expert: bool) -> None:
    shape = Workload(
        name="", leading=(2, 2), in_features=3, out_features=2, ranks=(1, 2), dropout=0.4, per_expert=per_expert
    )
    inputs = make_inputs(shape, torch.float64)

    def delta(x: Tensor, gate: Tensor, *experts: Tensor) -> Tensor:
        changed: LoraInputs = replace(inputs, x=x, gate=gate, lora_a=experts[:2], lora_b=experts[2:])
        return multi_lora_op(changed, backend="triton")

    tensors = [t.detach().requires_grad_() for t in (inputs.x, inputs.gate, *inputs.lora_a, *inputs.lora_b)]
    assert torch.autograd.gradcheck(delta, tensors, fast_mode=True)


@pytest.mark.usefixtures("triton_on_cpu")
def test_opcheck() -> None:
    inputs = make_inputs(Workload(name="", leading=(2, 3), in_features=8, out_features=6, ranks=(2, 3), dropout=0.2))
    a, b = ([t.clone().requires_grad_() for t in ts] for ts in (inputs.lora_a, inputs.lora_b))
    arguments = (
        inputs.x.clone().requires_grad_(), inputs.grad.clone(), a, b, inputs.gate.clone().requires_grad_(),
        list(inputs.scale), inputs.dropout, False, inputs.seed, "triton", True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.dmole_kernels.multi_lora.default, arguments)
