# SPDX-License-Identifier: Apache-2.0
"""Ways to compute a linear layer with several gated LoRA experts, each as its users would write it.

Work that depends on weights or gates alone (packing, sorting rows by expert, padding ranks, finding the active experts)
is done once and not timed, for every baseline; so is the gate block of this package, which users open once a step.

    base_only         F.linear alone: no experts; subtracted from the others to get their overhead
    packed_eager      one packed A and B, prepared ahead; hand-written backward: the fastest form in plain PyTorch
    packed_compiled   the same formulas under torch.compile
    peft_mixed        PEFT's own layer with `adapter_names` (inference, one adapter a sample)
    peft_loop         its loop over adapters, each on its own rows, with autograd; gates allowed
    dmole_loop        the published D-MoLE layer's loop: every expert the batch uses, on all rows
    grouped_mm        rows sorted by expert, F.grouped_mm twice, ranks padded to the largest
    reference, cpu    this package's MultiLoRALinear with that backend; triton_fused: with fuse_base
    cpu_pytorch_base  the cpu backend's experts beside F.linear, where it would take its own kernel for the base
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from benchmarks.benchmark import CannotTake
from benchmarks.lora_case import LoraProblem
from dmole_kernels import BACKENDS, ExpertGates, MultiLoRALinear, cpu

MOST_BYTES = 2**32  # what a baseline may spend on one intermediate tensor


@dataclass(frozen=True, kw_only=True)
class Built:
    """`forward(x)` is differentiable in x and in `parameters`; `gradients` names their gradients da_<e> and db_<e>."""

    forward: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...] = ()
    gradients: Callable[[Sequence[Tensor]], dict[str, Tensor]] = lambda grads: {}
    trains: bool = True


def _separate(problem: LoraProblem) -> tuple[list[Tensor], list[Tensor], Built]:
    """A and B of each expert as leaves, and a Built with their names; callers replace its forward."""
    inputs = problem.inputs
    lora_a = [a.detach().requires_grad_(flag) for a, flag in zip(inputs.lora_a, inputs.trainable, strict=True)]
    lora_b = [b.detach().requires_grad_(flag) for b, flag in zip(inputs.lora_b, inputs.trainable, strict=True)]
    names = [f"{matrix}_{e}" for e, flag in enumerate(inputs.trainable) if flag for matrix in ("da", "db")]
    leaves = tuple(t for a, b in zip(lora_a, lora_b, strict=True) if a.requires_grad for t in (a, b))
    built = Built(forward=lambda x: x, parameters=leaves, gradients=lambda grads: dict(zip(names, grads, strict=True)))
    return lora_a, lora_b, built


def _with_forward(built: Built, forward: Callable[[Tensor], Tensor]) -> Built:
    return Built(forward=forward, parameters=built.parameters, gradients=built.gradients)


def base_only(problem: LoraProblem) -> Built:
    return Built(forward=lambda x: F.linear(x, problem.weight))


class _Packed(torch.autograd.Function):
    """base + ((x A^T) * C) B^T; saves x and S. The last `trainable` columns are trainable."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: Tensor, a_RD: Tensor, b_RP: Tensor, column_G1R: Tensor, trainable_a: Tensor,
        trainable_b: Tensor,
    ) -> Tensor:  # fmt: skip
        x_ND = x.reshape(-1, x.shape[-1])
        s_NR = x_ND @ a_RD.t()
        gated_NR = (s_NR.view(column_G1R.shape[0], -1, s_NR.shape[1]) * column_G1R).view(s_NR.shape)
        ctx.save_for_backward(x_ND, s_NR, a_RD, b_RP, column_G1R)
        ctx.trainable = trainable_a.shape[0]
        return torch.addmm(base.reshape(-1, base.shape[-1]), gated_NR, b_RP).view(base.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, s_NR, a_RD, b_RP, column_G1R = ctx.saved_tensors
        grad_NP = grad.reshape(-1, grad.shape[-1])
        shape = (column_G1R.shape[0], -1, s_NR.shape[1])
        ds_NR = ((grad_NP @ b_RP.t()).view(shape) * column_G1R).view(s_NR.shape)
        gated_NR = (s_NR.view(shape) * column_G1R).view(s_NR.shape)
        da = db = None
        if ctx.trainable:
            da = ds_NR[:, -ctx.trainable :].t() @ x_ND
            db = gated_NR[:, -ctx.trainable :].t() @ grad_NP
        return (ds_NR @ a_RD).view(*grad.shape[:-1], -1), grad, None, None, None, da, db


def _packed_tensors(problem: LoraProblem) -> tuple[list[int], Tensor, Tensor, Tensor, list[int]]:
    """(active experts, frozen first; A [R, D]; B^T [R, P]; C [G, 1, R]; ranks of the trainable ones)."""
    inputs = problem.inputs
    order = sorted(problem.active, key=lambda e: inputs.trainable[e])
    a_RD = torch.cat([inputs.lora_a[e] for e in order])
    b_RP = torch.cat([inputs.lora_b[e].t() for e in order]).contiguous()
    gate_GE = inputs.gate.reshape(-1, len(inputs.scale))
    pieces = [(gate_GE[:, e, None] * inputs.scale[e]).expand(-1, problem.case.ranks[e]) for e in order]
    column_G1R = torch.cat(pieces, 1).to(a_RD.dtype).unsqueeze(1)
    return order, a_RD, b_RP, column_G1R, [problem.case.ranks[e] for e in order if inputs.trainable[e]]


def _packed_gradients(experts: Sequence[int], ranks: Sequence[int]) -> Callable[[Sequence[Tensor]], dict[str, Tensor]]:
    def named(grads: Sequence[Tensor]) -> dict[str, Tensor]:
        pieces = zip(experts, torch.split(grads[0], list(ranks)), torch.split(grads[1], list(ranks)), strict=True)
        return {name: grad for e, da, db in pieces for name, grad in ((f"da_{e}", da), (f"db_{e}", db.t()))}

    return named


def packed_eager(problem: LoraProblem) -> Built:
    order, a_RD, b_RP, column_G1R, ranks = _packed_tensors(problem)
    # The leaves are views of the packed matrices, as an optimizer would have them.
    start = a_RD.shape[0] - sum(ranks)
    trainable_a, trainable_b = a_RD[start:].detach().requires_grad_(), b_RP[start:].detach().requires_grad_()

    def forward(x: Tensor) -> Tensor:
        base = F.linear(x, problem.weight)
        y: Tensor = _Packed.apply(  # type: ignore[no-untyped-call]
            F.dropout(x, problem.inputs.dropout), base, a_RD, b_RP, column_G1R, trainable_a, trainable_b
        )
        return y

    trainable = [e for e in order if problem.inputs.trainable[e]]
    if not trainable:
        return Built(forward=forward)
    return Built(forward=forward, parameters=(trainable_a, trainable_b), gradients=_packed_gradients(trainable, ranks))


def packed_compiled(problem: LoraProblem) -> Built:
    if not all(problem.inputs.trainable):
        raise CannotTake("its packed matrices are trainable as a whole; this case has frozen experts")
    order, a_RD, b_RP, column_G1R, ranks = _packed_tensors(problem)
    a_RD.requires_grad_()
    b_RP.requires_grad_()

    def plain(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, column: Tensor) -> Tensor:
        base = F.linear(x, weight)
        x_ND = F.dropout(x, problem.inputs.dropout).reshape(-1, x.shape[-1])
        s_NR = x_ND @ a.t()
        gated_NR = (s_NR.view(column.shape[0], -1, s_NR.shape[1]) * column).view(s_NR.shape)
        return torch.addmm(base.reshape(-1, base.shape[-1]), gated_NR, b).view(base.shape)

    compiled = torch.compile(plain, fullgraph=True, dynamic=False)
    try:
        # Without a working compiler the first call fails; the exception type varies.
        compiled(problem.inputs.x, problem.weight, a_RD, b_RP, column_G1R)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CannotTake(f"torch.compile does not run here: {reason}") from error
    return Built(
        forward=lambda x: compiled(x, problem.weight, a_RD, b_RP, column_G1R),
        parameters=(a_RD, b_RP),
        gradients=_packed_gradients(order, ranks),
    )


def _linear_of(problem: LoraProblem) -> nn.Linear:
    outputs, features = problem.weight.shape
    linear = nn.Linear(features, outputs, bias=False, device="meta")
    linear.weight = nn.Parameter(problem.weight)
    return linear


def peft_mixed(problem: LoraProblem) -> Built:
    case, inputs = problem.case, problem.inputs
    if case.level != "sample" or not problem.hard or bool((inputs.gate.sum(-1) > 1).any()):
        raise CannotTake("adapter_names takes one adapter a sample, with no gate")
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise CannotTake("peft is not installed") from error
    linear = _linear_of(problem)
    model: Any = None
    with warnings.catch_warnings():
        # PEFT warns about each adapter beyond the first; several adapters are intended here.
        warnings.simplefilter("ignore")
        for e in problem.active:
            alpha = inputs.scale[e] * case.ranks[e]
            config: Any = peft.LoraConfig(r=case.ranks[e], lora_alpha=alpha, target_modules=["linear"])
            if model is None:
                wrapped: Any = nn.Sequential()
                wrapped.add_module("linear", linear)
                model = peft.get_peft_model(wrapped, config, adapter_name=f"e{e}")
            else:
                model.add_adapter(f"e{e}", config)
    layer = model.base_model.model.linear
    for e in problem.active:
        layer.lora_A[f"e{e}"].weight = nn.Parameter(inputs.lora_a[e])
        layer.lora_B[f"e{e}"].weight = nn.Parameter(inputs.lora_b[e])
    layer.eval()
    best_S = inputs.gate.argmax(-1).tolist()
    names = [f"e{e}" if bool(inputs.gate[s, e] != 0) else "__base__" for s, e in enumerate(best_S)]
    return Built(forward=lambda x: layer(x, adapter_names=names), trains=False)


def peft_loop(problem: LoraProblem) -> Built:
    lora_a, lora_b, built = _separate(problem)
    rows = {e: problem.rows_of(e) for e in problem.active}
    gates = {e: problem.gate_NE[rows[e], e, None].to(problem.weight.dtype) for e in problem.active}

    def forward(x: Tensor) -> Tensor:
        result = F.linear(x, problem.weight)
        result_NP, x_ND = result.view(-1, result.shape[-1]), x.reshape(-1, x.shape[-1])
        for e in problem.active:
            sub_batch = F.dropout(x_ND.index_select(0, rows[e]), problem.inputs.dropout)
            output = F.linear(F.linear(sub_batch, lora_a[e]), lora_b[e]) * problem.inputs.scale[e]
            result_NP.index_add_(0, rows[e], output if problem.hard else output * gates[e])
        return result

    return _with_forward(built, forward)


def dmole_loop(problem: LoraProblem) -> Built:
    lora_a, lora_b, built = _separate(problem)
    gate = problem.inputs.gate
    gate_S1E = (gate if problem.case.level == "token" else gate.unsqueeze(1)).to(problem.weight.dtype)

    def forward(x: Tensor) -> Tensor:
        result = F.linear(x, problem.weight)
        total = torch.zeros_like(result)
        for e in range(len(lora_a)):
            gate_e = gate_S1E[..., e, None]
            if not bool((gate_e != 0).any()):  # a host synchronisation for each expert, as in the published layer
                continue
            dropped = F.dropout(x, problem.inputs.dropout)  # a mask for each expert, as in the published layer
            delta = F.linear(F.linear(dropped, lora_a[e]), lora_b[e]) * problem.inputs.scale[e]
            total = total + gate_e * delta
        return result + total

    return _with_forward(built, forward)


def grouped_mm(problem: LoraProblem) -> Built:
    inputs, case, active = problem.inputs, problem.case, problem.active
    dtype = problem.weight.dtype
    aligned = 16 // problem.weight.element_size()
    if not all(inputs.trainable):
        raise CannotTake("its stacked matrices are trainable as a whole; this case has frozen experts")
    if case.in_features % aligned or case.out_features % aligned:
        raise CannotTake(f"F.grouped_mm needs widths that are multiples of {aligned} in {dtype}")
    rows = [problem.rows_of(e) for e in active]
    pairs = sum(len(r) for r in rows)
    if pairs * max(case.in_features, case.out_features) * problem.weight.element_size() > MOST_BYTES:
        raise CannotTake(f"{pairs} pairs of row and expert take more than {MOST_BYTES >> 30} GiB")
    widest = max(case.ranks[e] for e in active)
    padded = -(-widest // aligned) * aligned
    stacked_a = torch.stack([F.pad(inputs.lora_a[e], (0, 0, 0, padded - case.ranks[e])) for e in active])
    stacked_b = torch.stack([F.pad(inputs.lora_b[e], (0, padded - case.ranks[e])) for e in active])
    stacked_a.requires_grad_()
    stacked_b.requires_grad_()
    pair_rows = torch.cat(rows)
    factors = [problem.gate_NE[r, e] * inputs.scale[e] for r, e in zip(rows, active, strict=True)]
    factor_M1 = torch.cat(factors)[:, None].to(dtype)
    offsets = torch.tensor([len(r) for r in rows]).cumsum(0).to(problem.weight.device, torch.int32)

    def forward(x: Tensor) -> Tensor:
        result = F.linear(x, problem.weight)
        x_ND = F.dropout(x, inputs.dropout).reshape(-1, x.shape[-1])
        s_MR = F.grouped_mm(x_ND.index_select(0, pair_rows), stacked_a.transpose(1, 2), offs=offsets)
        output_MP = F.grouped_mm(s_MR * factor_M1, stacked_b.transpose(1, 2), offs=offsets)
        result.view(-1, result.shape[-1]).index_add_(0, pair_rows, output_MP)
        return result

    def gradients(grads: Sequence[Tensor]) -> dict[str, Tensor]:
        named = {f"da_{e}": grads[0][i, : case.ranks[e]] for i, e in enumerate(active)}
        return named | {f"db_{e}": grads[1][i, :, : case.ranks[e]] for i, e in enumerate(active)}

    return Built(forward=forward, parameters=(stacked_a, stacked_b), gradients=gradients)


def module_of(backend: str, *, fuse_base: bool = False) -> Callable[[LoraProblem], Built]:
    """MultiLoRALinear with this backend; its experts are in the working dtype, as in all providers."""

    def build(problem: LoraProblem) -> Built:
        case, inputs = problem.case, problem.inputs
        linear = _linear_of(problem)
        gates = ExpertGates()
        layer = MultiLoRALinear(linear, gates=gates, dropout=inputs.dropout, backend=backend, fuse_base=fuse_base)
        names = [f"e{e}" for e in range(len(case.ranks))]
        for e, name in enumerate(names):
            layer.bank.add(name, case.ranks[e], alpha=inputs.scale[e] * case.ranks[e], trainable=inputs.trainable[e])
        # In the working dtype, as the baselines have them: the bank itself keeps its experts in float32.
        for e, name in enumerate(names):
            expert = layer.bank.expert(name)
            expert.lora_a = nn.Parameter(inputs.lora_a[e].clone(), requires_grad=inputs.trainable[e])
            expert.lora_b = nn.Parameter(inputs.lora_b[e].clone(), requires_grad=inputs.trainable[e])
        # The block stays open: it is opened once a step, and here the step does not end. It is opened at the first
        # call because suites build their cases in generators, and a block opened there applies in the generator only.
        opened: list[AbstractContextManager[object]] = []

        def forward(x: Tensor) -> Tensor:
            if not opened:
                opened.append(gates.use(inputs.gate, names))
                opened[0].__enter__()
            y: Tensor = layer(x)
            return y

        keys = [f"{matrix}_{e}" for e, flag in enumerate(inputs.trainable) if flag for matrix in ("da", "db")]
        experts = [layer.bank.expert(name) for e, name in enumerate(names) if inputs.trainable[e]]
        leaves = tuple(p for expert in experts for p in (expert.lora_a, expert.lora_b))
        return Built(forward=forward, parameters=leaves, gradients=lambda grads: dict(zip(keys, grads, strict=True)))

    return build


def cpu_pytorch_base(problem: LoraProblem) -> Built:
    if cpu.EXTENSION is None:
        raise CannotTake(f"no compiled extension: {cpu.MISSING}")
    built = module_of("cpu")(problem)

    def forward(x: Tensor) -> Tensor:
        before, cpu.LINEAR = cpu.LINEAR, "vendor"
        try:
            return built.forward(x)
        finally:
            cpu.LINEAR = before

    return _with_forward(built, forward)


def backends(device_type: str) -> tuple[str, ...]:
    """The backends of this build that support the device type, fastest first."""
    return tuple(name for name, devices in BACKENDS.items() if devices is None or device_type in devices)


def cpu_backends() -> tuple[str, ...]:
    return backends("cpu")


BASELINES: Mapping[str, Callable[[LoraProblem], Built]] = {
    "base_only": base_only,
    "packed_eager": packed_eager,
    "packed_compiled": packed_compiled,
    "peft_mixed": peft_mixed,
    "peft_loop": peft_loop,
    "dmole_loop": dmole_loop,
    "grouped_mm": grouped_mm,
    "cpu_pytorch_base": cpu_pytorch_base,
}


def builders(device_type: str = "cpu") -> dict[str, Callable[[LoraProblem], Built]]:
    """Every provider by name; those of this package are named after their backends."""
    own = {backend: module_of(backend) for backend in backends(device_type)}
    if "triton" in own:
        own["triton_fused"] = module_of("triton", fuse_base=True)
    return {**BASELINES, **own}
