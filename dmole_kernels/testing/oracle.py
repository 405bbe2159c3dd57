# SPDX-License-Identifier: Apache-2.0
"""One call's output and gradients: by the definition and autograd, by the registered op, by a pair of kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dmole_kernels import reference
from dmole_kernels._lora_call import Wanted
from dmole_kernels._multi_lora import multi_lora
from dmole_kernels._philox import dropout_keep_mask
from dmole_kernels.testing.workloads import LoraInputs

Results = dict[str, Tensor]


def multi_lora_loop(inputs: LoraInputs) -> Tensor:
    """The definition, one expert at a time, differentiated by autograd: `sum_e g_e s_e (dropout(x) A_e^T) B_e^T`."""
    x = inputs.x
    rows = x.shape[:-1].numel()
    gate = inputs.gate.reshape(*inputs.gate.shape[:-1], *[1] * (x.dim() - inputs.gate.dim()), inputs.gate.shape[-1])
    delta = x.new_zeros(*x.shape[:-1], inputs.lora_b[0].shape[0])
    for e, (a, b, scale) in enumerate(zip(inputs.lora_a, inputs.lora_b, inputs.scale, strict=True)):
        x_hat = x
        if inputs.dropout > 0.0:
            stream = e if inputs.per_expert else 0
            keep = dropout_keep_mask(int(inputs.seed), rows, x.shape[-1], inputs.dropout, stream=stream)
            x_hat = x * keep.view(x.shape) / (1.0 - inputs.dropout)
        delta = delta + gate[..., e, None] * scale * (x_hat @ a.t() @ b.t())
    return delta


def multi_lora_op(inputs: LoraInputs, *, backend: str = "auto") -> Tensor:
    """The registered op on the same inputs, without a base: the delta alone."""
    return multi_lora(
        inputs.x,
        None,
        inputs.lora_a,
        inputs.lora_b,
        inputs.gate,
        inputs.scale,
        dropout=inputs.dropout,
        dropout_mode="per_expert" if inputs.per_expert else "shared",
        seed=inputs.seed,
        backend=backend,
    )


def run_autograd(function: Callable[[LoraInputs], Tensor], inputs: LoraInputs) -> Results:
    """The function's output and its gradients for x, the gate and every trainable expert."""
    x = inputs.x.detach().requires_grad_()
    gate = inputs.gate.detach().requires_grad_()
    pairs = list(zip(inputs.lora_a, inputs.lora_b, inputs.trainable, strict=True))
    lora_a = tuple(a.detach().requires_grad_(flag) for a, _, flag in pairs)
    lora_b = tuple(b.detach().requires_grad_(flag) for _, b, flag in pairs)
    delta = function(replace(inputs, x=x, gate=gate, lora_a=lora_a, lora_b=lora_b))
    torch.autograd.backward(delta, inputs.grad)
    results = {"delta": delta.detach(), "dx": x.grad, "dgate": gate.grad}
    for e, flag in enumerate(inputs.trainable):
        if flag:
            results |= {f"da_{e}": lora_a[e].grad, f"db_{e}": lora_b[e].grad}
    missing = [name for name, tensor in results.items() if tensor is None]
    if missing:
        raise ValueError(f"no gradient for {', '.join(missing)}; expected one for each differentiable input.")
    return {name: tensor for name, tensor in results.items() if tensor is not None}


def run_kernels(
    forward: Callable[..., tuple[Tensor, Tensor]], backward: Callable[..., tuple[Tensor, ...]], inputs: LoraInputs
) -> Results:
    """The same from a pair with the signatures of `reference.multi_lora_forward` and `_backward`, called directly."""
    call = inputs.call()
    delta, shrunk_NR = forward(call)
    dx, da_RD, db_RP, dgate_GE = backward(call, inputs.grad, shrunk_NR, Wanted(True, True, list(inputs.trainable)))
    results = {"delta": delta, "dx": dx, "dgate": dgate_GE.view(inputs.gate.shape)}
    chosen = [e for e, flag in enumerate(inputs.trainable) if flag]
    if chosen:
        ranks = [inputs.lora_a[e].shape[0] for e in chosen]
        for e, da, db in zip(chosen, torch.split(da_RD, ranks), torch.split(db_RP, ranks), strict=True):
            results |= {f"da_{e}": da, f"db_{e}": db.t()}
    return results


def run_reference(inputs: LoraInputs) -> Results:
    return run_kernels(reference.multi_lora_forward, reference.multi_lora_backward, inputs)
