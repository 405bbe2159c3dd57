# SPDX-License-Identifier: Apache-2.0
"""
    Equals `y = base; for e: y += g[:, e, None] * s[e] * (dropout(x) @ A[e].T) @ B[e].T`, without a loop over experts,
    without a mask kept for backward, and without a gradient buffer for frozen experts:

    forward   S = x^ A^T              y = base + (S * C) B^T           C[n, j] = g[n, e(j)] s[e(j)]
    backward  P = dY B                dS = P * C
              dB = dY^T (S * C)       dA = dS^T x^                     (trainable experts only)
              dx = keep/(1-q) (dS A)  dg[n, e] = s[e] sum_{j in e} P[n, j] S[n, j]

Source: D-MoLE (arXiv 2506.11672) Eq. 2; x^ = x * keep / (1-q) with keep from `philox.dropout_keep_mask`.

Shape letters: N rows, D in_features, P out_features, E experts, R packed ranks, G gate rows (each covers N / G rows).

Example, four tokens of two samples, expert 0 of rank 1 and expert 1 of rank 2, so column j of S belongs to e = 0, 1, 1:

    gate_GE = [[1, 0],     scale = [2, 3]     C = [[2, 0, 0],    tokens 0 and 1 (sample 0)
               [0, 1]]                             [2, 0, 0],
                                                   [0, 3, 3],    tokens 2 and 3 (sample 1)
                                                   [0, 3, 3]]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from dmole_kernels import cpu, cuda, reference, triton_backend
from dmole_kernels._argument_checks import check_floating, check_one_device
from dmole_kernels._backend import BACKENDS, choose_backend, without_autocast
from dmole_kernels._registration import register_op
from dmole_kernels._transforms import transforms_active
from dmole_kernels.cpu import RowMap

DropoutMode = Literal["shared", "per_expert"]


def multi_lora(
    x: Tensor, base: Tensor | None, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], gate: Tensor,
    scale: Sequence[float], *, dropout: float = 0.0, dropout_mode: DropoutMode = "shared", seed: Tensor | None = None,
    backend: str = "auto", plan: RowMap | None = None,
) -> Tensor:  # fmt: skip
    """Adds the gated LoRA experts to a linear layer's output: `base + sum_e gate_e scale_e B_e A_e dropout(x)`.

    Args:
        x: [..., in_features], any strides, any number of leading dimensions, zero rows allowed.
        base: [..., out_features], the layer's own output; None gives the experts' sum alone.
        lora_a: per expert [rank, in_features]; ranks may differ.
        lora_b: per expert [out_features, rank].
        gate: [..., experts]; its leading dimensions are a prefix of x's: [S, E] gates whole samples of x [S, T, D],
            [S, T, E] gates tokens. Any real value; differentiable.
        scale: per expert, alpha / rank.
        dropout: chance of zeroing an element of x, in [0, 1).
        dropout_mode: "shared" draws one mask for all experts, "per_expert" one for each.
        seed: int64 scalar that determines the masks, on the CPU or on x's device; drawn from torch's default generator
            for the CPU when None, so restoring that generator's state repeats them (while a CUDA graph is captured,
            from the device's, so that every replay draws anew).
        backend: see `choose_backend`.
        plan: which rows each expert serves, for this gate and as many rows as x has; the cpu backend makes its own when
            None. Not for a gate that requires grad.

    Computes in base's dtype (x's when base is None); x and experts are cast to it, their gradients cast back, so
    experts may stay float32 beside a bfloat16 model. A new tensor is returned; inputs are only read. Saved for
    backward: x and S = dropout(x) A^T where an expert is trainable; neither where all are frozen and the gate constant.
    On the cpu backend an expert costs the rows whose gate for it is not zero (all rows when the gate requires grad: a
    zero gate is owed its gradient); elsewhere, and under torch.compile or torch.func, experts with a gate of zero are
    computed all the same: leave them out of the lists (MultiLoRALinear does). First derivatives only. The cuda backend
    is for decoding: at most 16 rows, no dropout, no backward; it reads an expert for the rows whose gate for it is not
    zero.

    Raises:
        ValueError: for shapes, counts, dtypes, devices or probabilities that do not fit together, or a backend that is
            not there.
    """
    check_experts(x, base, lora_a, lora_b, gate, scale)
    check_dropout(dropout, dropout_mode)
    check_seed(seed)
    choice = choose_backend(
        backend,
        x.device.type,
        x.dtype if base is None else base.dtype,
        decode_rows=None if dropout > 0.0 or torch.is_grad_enabled() else x.shape[:-1].numel(),
    )
    transformed = transforms_active()
    # Under torch.func a gate does not always say whether it is differentiated.
    trained_gate = transformed or (gate.requires_grad and torch.is_grad_enabled())
    if plan is not None:
        _check_plan(plan, x, trained_gate)
    seed = seed_for(x.device, dropout, seed)
    settings = (list(scale), dropout, dropout_mode == "per_expert", seed, choice.name, trained_gate)
    y: Tensor
    if torch.compiler.is_compiling() or transformed or is_in_torch_dispatch_mode():
        y, _ = _FORWARD_OP(x, base, list(lora_a), list(lora_b), gate, *settings)
        return y
    words = None if plan is None else plan.table
    if torch.is_grad_enabled():
        y, _ = _EagerMultiLora.apply(settings, words, x, base, gate, *lora_a, *lora_b)  # type: ignore[no-untyped-call]
    else:
        y, _ = _forward(x, base, list(lora_a), list(lora_b), gate, *settings, words)
    return y


def seed_for(device: torch.device, dropout: float, seed: Tensor | None) -> Tensor | None:
    """The seed given, or one drawn; None without dropout."""
    if dropout == 0.0 or seed is not None:
        return seed if dropout > 0.0 else None
    # A CUDA graph replays launches, not the host: there the device has to draw.
    captured = device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device if captured else "cpu")


def check_experts(
    x: Tensor, base: Tensor | None, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], gate: Tensor,
    scale: Sequence[float],
) -> None:  # fmt: skip
    experts = len(lora_a)
    if x.dim() == 0 or gate.dim() == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and gate {tuple(gate.shape)}; expected [..., features] and [..., experts]. "
            f"Give both a last dimension."
        )
    if experts == 0:
        raise ValueError("lora_a is empty; expected at least one expert. Without experts use the base output itself.")
    if len(lora_b) != experts or len(scale) != experts or gate.shape[-1] != experts:
        raise ValueError(
            f"lora_a has {experts} experts, lora_b {len(lora_b)}, scale {len(scale)}, gate {gate.shape[-1]}; expected "
            f"the same number. Give every expert one A, one B, one scale and one gate column."
        )
    check_floating(x=x if base is None else base)
    check_one_device(x=x, base=base, gate=gate)
    outputs, device = lora_b[0].shape[0] if lora_b[0].dim() else 0, x.device
    for e, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != x.shape[-1] or b.shape != (outputs, a.shape[0]):
            raise ValueError(
                f"expert {e} has lora_a {tuple(a.shape)} and lora_b {tuple(b.shape)}; expected [rank, {x.shape[-1]}] "
                f"and [{outputs}, rank]. Check in_features and out_features of the layer."
            )
        if a.device != device or b.device != device:
            check_one_device(**{"x": x, f"lora_a[{e}]": a, f"lora_b[{e}]": b})
    if base is not None and base.shape != (*x.shape[:-1], outputs):
        raise ValueError(
            f"base has shape {tuple(base.shape)}; expected {(*x.shape[:-1], outputs)}. Pass the layer's output "
            f"for this x."
        )
    leading = gate.shape[:-1]
    if len(leading) >= x.dim() or leading != x.shape[: len(leading)]:
        raise ValueError(
            f"gate has shape {tuple(gate.shape)} and x {tuple(x.shape)}; expected gate's leading dimensions to begin "
            f"x's. Use [samples, experts] gates for x [samples, ..., features] or [samples, tokens, experts] gates."
        )


def check_dropout(dropout: float, dropout_mode: str) -> None:
    """Raises ValueError for a chance outside [0, 1) or an unknown mode."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}; expected a chance in [0, 1). Use 0.05 for five percent.")
    if dropout_mode not in ("shared", "per_expert"):
        raise ValueError(f"dropout_mode is {dropout_mode!r}; expected 'shared' or 'per_expert'. Drop it for 'shared'.")


def check_seed(seed: Tensor | None) -> None:
    if seed is None:
        return
    if not isinstance(seed, Tensor) or seed.numel() != 1 or seed.is_floating_point():
        raise ValueError(
            f"seed is {seed!r}; expected an integer tensor of one element. Use torch.tensor(2025), or None to draw one."
        )


def _check_plan(plan: RowMap, x: Tensor, trained_gate: bool) -> None:
    if plan.rows != x.shape[:-1].numel() or (trained_gate and not plan.every_column):
        raise ValueError(
            f"plan is for {plan.rows} rows and {'every' if plan.every_column else 'not every'} column, x has "
            f"{x.shape[:-1].numel()} rows and the gate {'requires' if trained_gate else 'does not require'} grad; "
            f"expected as many rows, and every column for such a gate. Build the plan from this gate, or pass none."
        )


# Backend name -> kernel; a compiled backend adds its line to both and its name to backend.BACKENDS. Kernels that pass
# over pairs of row and expert with a gate of zero take two more arguments: whether they may not, and the pairs' plan.
FORWARD: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"reference": reference.multi_lora_forward}
BACKWARD: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]] = {"reference": reference.multi_lora_backward}
PLANNED = {"cpu", "triton"} & set(BACKENDS)
if "cpu" in BACKENDS:
    FORWARD["cpu"] = cpu.multi_lora_forward
    BACKWARD["cpu"] = cpu.multi_lora_backward
if "triton" in BACKENDS:
    FORWARD["triton"] = triton_backend.kernel("multi_lora", "multi_lora_forward")
    BACKWARD["triton"] = triton_backend.kernel("multi_lora", "multi_lora_backward")
if "cuda" in BACKENDS:
    FORWARD["cuda"] = cuda.multi_lora_forward
    BACKWARD["cuda"] = cuda.absent("backward of multi_lora")


def _forward(
    x: Tensor, base: Tensor | None, lora_a: list[Tensor], lora_b: list[Tensor], gate: Tensor, scale: list[float],
    dropout: float, per_expert: bool, seed: Tensor | None, backend: str, every_column: bool,
    plan: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    planned = (every_column, plan) if backend in PLANNED else ()
    # base settles the dtype; autocast inside the kernel would contradict the fake implementation.
    with without_autocast(x.device.type):
        return FORWARD[backend](
            x, base, lora_a, lora_b, gate.reshape(-1, len(scale)), scale, dropout, per_expert, seed, *planned
        )


def _backward(
    grad: Tensor, x: Tensor | None, shrunk: Tensor | None, lora_a: list[Tensor], lora_b: list[Tensor], gate: Tensor,
    scale: list[float], dropout: float, per_expert: bool, seed: Tensor | None, need_x: bool, need_gate: bool,
    trainable: list[bool], backend: str, plan: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    planned = (plan,) if backend in PLANNED else ()
    with without_autocast(grad.device.type):
        return BACKWARD[backend](
            grad, x, shrunk, lora_a, lora_b, gate.reshape(-1, len(scale)), scale, dropout, per_expert, seed, need_x,
            need_gate, trainable, *planned,
        )  # fmt: skip


def _forward_fake(
    x: Tensor, base: Tensor | None, lora_a: list[Tensor], lora_b: list[Tensor], gate: Tensor, scale: list[float],
    dropout: float, per_expert: bool, seed: Tensor | None, backend: str, every_column: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = x.dtype if base is None else base.dtype
    rows = x.shape[:-1].numel()
    y = x.new_empty((*x.shape[:-1], lora_b[0].shape[0]), dtype=dtype)
    return y, x.new_empty((rows, sum(a.shape[0] for a in lora_a)), dtype=dtype)


def _backward_fake(
    grad: Tensor, x: Tensor | None, shrunk: Tensor | None, lora_a: list[Tensor], lora_b: list[Tensor], gate: Tensor,
    scale: list[float], dropout: float, per_expert: bool, seed: Tensor | None, need_x: bool, need_gate: bool,
    trainable: list[bool], backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    features, outputs = lora_a[0].shape[1], lora_b[0].shape[0]
    columns = sum(a.shape[0] for a, flag in zip(lora_a, trainable, strict=True) if flag)
    nothing = grad.new_empty(0)
    return (
        grad.new_empty((*grad.shape[:-1], features)) if need_x else nothing,
        grad.new_empty((columns, features)) if columns else grad.new_empty(0),
        grad.new_empty((columns, outputs)) if columns else grad.new_empty(0),
        gate.new_empty((gate.shape[:-1].numel(), gate.shape[-1])) if need_gate else grad.new_empty(0),
    )


def save_for_derivative(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, base, lora_a, lora_b, gate, scale, dropout, per_expert, seed, backend, every_column = inputs
    if gate.requires_grad and not every_column:
        raise ValueError(
            "the gate requires grad and every_column is False; expected True, since a gate of zero is owed its "
            "gradient. Pass every_column=True or a detached gate."
        )
    ctx.trainable = [a.requires_grad or b.requires_grad for a, b in zip(lora_a, lora_b, strict=True)]
    ctx.wants = (x.requires_grad, base is not None and base.requires_grad, gate.requires_grad)
    ctx.x_dtype = x.dtype
    ctx.rest = (scale, dropout, per_expert)
    ctx.backend = backend
    ctx.plan = None
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    # Frozen experts and a constant gate need neither x nor S: holding them would keep whole activations alive.
    kept_x = x if any(ctx.trainable) else None
    kept_s = output[1] if any(ctx.trainable) or gate.requires_grad else None
    ctx.save_for_backward(kept_x, kept_s, gate, seed, *lora_a, *lora_b)


def multi_lora_derivative(ctx: Any, grad: Tensor | None, _grad_shrunk: None) -> tuple[Any, ...]:
    x, shrunk, gate, seed, *experts = ctx.saved_tensors
    count = len(experts) // 2
    lora_a, lora_b = experts[:count], experts[count:]
    wants_x, wants_base, wants_gate = ctx.wants
    grad_a: list[Tensor | None] = [None] * count
    grad_b: list[Tensor | None] = [None] * count
    if grad is None:
        return None, None, grad_a, grad_b, None, None, None, None, None, None, None
    dx, dgate = None, None
    if wants_x or wants_gate or any(ctx.trainable):
        scale, dropout, per_expert = ctx.rest
        arguments = (
            grad, x, shrunk, lora_a, lora_b, gate, scale, dropout, per_expert, seed, wants_x, wants_gate,
            ctx.trainable, ctx.backend,
        )  # fmt: skip
        dx_packed, da, db, dgate_packed = (
            _BACKWARD_OP(*arguments)
            if ctx.plan is None or is_in_torch_dispatch_mode()
            else _backward(*arguments, ctx.plan)
        )
        dx = dx_packed.to(ctx.x_dtype) if wants_x else None
        dgate = dgate_packed.view(gate.shape) if wants_gate else None
        chosen = [e for e, flag in enumerate(ctx.trainable) if flag]
        ranks = [lora_a[e].shape[0] for e in chosen]
        if chosen:
            for e, part_a, part_b in zip(chosen, da.split(ranks), db.split(ranks), strict=True):
                grad_a[e], grad_b[e] = part_a.to(lora_a[e].dtype), _transposed(part_b, lora_b[e].dtype)
    return dx, grad if wants_base else None, grad_a, grad_b, dgate, None, None, None, None, None, None


def _transposed(part_RP: Tensor, dtype: torch.dtype) -> Tensor:
    """dB in lora_b's own layout, cast in the same pass: autograd would copy any other layout once more."""
    return part_RP.t().to(dtype, memory_format=torch.contiguous_format)


class _EagerMultiLora(torch.autograd.Function):
    """The registered op's kernels and derivative without the dispatcher.

    On the way through a registered formula torch flattens and restores the lists of experts in Python: 0.1 ms of the
    0.3 ms that forward and backward of a tiny layer cost (torch 2.13, one thread of a Xeon, 2026-11). What traces or
    watches operations (torch.compile, dispatch modes) still sees the op.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: tuple[Any, ...], plan: Tensor | None, x: Tensor, base: Tensor | None, gate: Tensor,
        *experts: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        count = len(experts) // 2
        inputs = (x, base, list(experts[:count]), list(experts[count:]), gate, *settings)
        output = _forward(*inputs, plan)  # type: ignore[call-arg]
        save_for_derivative(ctx, inputs, output)
        ctx.plan = plan
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_shrunk: None) -> tuple[Tensor | None, ...]:
        dx, dbase, da, db, dgate, *_ = multi_lora_derivative(ctx, grad, grad_shrunk)
        return None, None, dx, dbase, dgate, *da, *db


def _jvp(arguments: tuple[Any, ...], tangents: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
    """The product rule: y is linear in x, in all A, in all B and in the gate; each term is the op on the sum so far."""
    dy = torch.zeros_like(output[0]) if tangents[1] is None else tangents[1]
    for place in (0, 2, 3, 4):
        tangent, value = tangents[place], arguments[place]
        if place in (2, 3):
            known = any(part is not None for part in tangent)
            tangent = [torch.zeros_like(v) if t is None else t for t, v in zip(tangent, value, strict=True)]
        else:
            known = tangent is not None
        if known:
            changed = list(arguments)
            changed[1], changed[place] = dy, tangent
            dy, _ = _FORWARD_OP(*changed)
    return dy, None


_FORWARD_OP = register_op(
    "multi_lora(Tensor x, Tensor? base, Tensor[] lora_a, Tensor[] lora_b, Tensor gate, float[] scale, float dropout, "
    "bool per_expert, Tensor? seed, str backend, bool every_column) -> (Tensor, Tensor)",
    kernel=_forward,
    fake=_forward_fake,
    backward=multi_lora_derivative,
    setup_context=save_for_derivative,
    jvp=_jvp,
)
_BACKWARD_OP = register_op(
    "multi_lora_backward(Tensor grad, Tensor? x, Tensor? shrunk, Tensor[] lora_a, Tensor[] lora_b, Tensor gate, "
    "float[] scale, float dropout, bool per_expert, Tensor? seed, bool need_x, bool need_gate, bool[] trainable, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_backward,
    fake=_backward_fake,
)
