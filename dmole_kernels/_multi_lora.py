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

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from dmole_kernels import cpu, cuda, reference, triton_backend
from dmole_kernels._argument_checks import check_floating, check_one_device
from dmole_kernels._backend import BACKENDS, Op, without_autocast
from dmole_kernels._lora_call import LoraCall, Wanted
from dmole_kernels._registration import refuse_transforms, register_op
from dmole_kernels.cpu import RowMap

DropoutMode = Literal["shared", "per_expert"]


def multi_lora(
    x: Tensor, base: Tensor | None, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], gate: Tensor,
    scale: Sequence[float], *, dropout: float = 0.0, dropout_mode: DropoutMode = "shared", seed: Tensor | None = None,
    backend: str = "auto", row_map: RowMap | None = None,
) -> Tensor:  # fmt: skip
    """Adds the gated LoRA experts to a linear layer's output: `base + sum_e gate_e scale_e B_e A_e dropout(x)`.

    Args:
        x: [..., in_features], any strides, any number of leading dimensions, zero rows allowed.
        base: [..., out_features], the layer's own output; None gives the experts' sum alone.
        lora_a: per expert [rank, in_features]; ranks may differ, a rank of zero adds nothing.
        lora_b: per expert [out_features, rank].
        gate: [..., experts]; its leading dimensions are a prefix of x's: [S, E] gates whole samples of x [S, T, D],
            [S, T, E] gates tokens. Any real value; differentiable. For a 1-D x, [E] or [1, E].
        scale: per expert, alpha / rank.
        dropout: chance of zeroing an element of x, in [0, 1).
        dropout_mode: "shared" draws one mask for all experts, "per_expert" one for each.
        seed: int64 scalar that determines the masks, on the CPU or on x's device; drawn from torch's default generator
            for the CPU when None, so restoring that generator's state repeats them (while a CUDA graph is captured,
            from the device's, so that every replay draws anew).
        backend: see `choose_backend`.
        row_map: which rows use each expert, for this gate and as many rows as x has; the cpu backend makes its own when
            None.

    Computes in base's dtype (x's when base is None); x and experts are cast to it, their gradients cast back, so
    experts may stay float32 beside a bfloat16 model. gate * scale is a float32 product at least. A new tensor is
    returned; inputs are only read. A gate of zero leaves the expert out of the row: inf and NaN in it reach neither y
    nor a gradient of x, A or B through that row.

    Saved for backward: x and S = dropout(x) A^T where an expert is trainable; neither where all are frozen and the gate
    constant. On the cpu backend the cost of an expert is that of the rows whose gate for it is not zero (all rows when
    the gate requires grad, because a gate of zero needs its gradient); elsewhere, and under torch.compile, experts with
    a gate of zero are computed all the same: leave them out of the lists (MultiLoRALinear does). First derivatives
    only; torch.func transforms are refused. The cuda backend is for decoding: at most 16 rows, no dropout, no backward.

    Raises:
        ValueError: for shapes, counts, dtypes, devices or probabilities that do not fit together, or a backend that is
            not there.
        NotImplementedError: under a torch.func transform or in forward-mode differentiation.
    """
    if x.dim() == 1:
        rows = multi_lora(
            x[None], None if base is None else base[None], lora_a, lora_b, gate[None] if gate.dim() == 1 else gate,
            scale, dropout=dropout, dropout_mode=dropout_mode, seed=seed, backend=backend, row_map=row_map,
        )  # fmt: skip
        return rows[0]
    check_experts(x, base, lora_a, lora_b, gate, scale)
    check_dropout(dropout, dropout_mode)
    check_seed(seed)
    trained_gate = gate.requires_grad and torch.is_grad_enabled()
    if row_map is not None:
        _check_row_map(row_map, x)
    call = LoraCall(
        x, base, lora_a, lora_b, gate.reshape(-1, len(scale)), scale, dropout, dropout_mode == "per_expert",
        seed_for(x.device, dropout, seed), trained_gate, None if row_map is None else row_map.table,
    )  # fmt: skip
    return run(call, MULTI_LORA.pick(backend, x.device.type, call.dtype))


def run(call: LoraCall, backend: str) -> Tensor:
    """y of a call whose arguments fit together, by the kernels of `backend`; differentiable."""
    refuse_transforms("multi_lora")
    x = call.x
    assert x is not None
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        if call.starts is not None:
            raise NotImplementedError("the registered op takes no group of linears; expected starts=None. Use eager.")
        y: Tensor = _FORWARD_OP(
            x, call.base, list(call.lora_a), list(call.lora_b), call.gate, list(call.scale), call.dropout,
            call.per_expert, call.seed, backend, call.every_column,
        )[0]  # fmt: skip
        return y
    return run_eager(call, backend)


def run_eager(call: LoraCall, backend: str) -> Tensor:
    """`run` where nothing traces or watches operations."""
    if call.starts is not None and backend != "reference":
        raise NotImplementedError(
            f"backend {backend!r} has no kernel for a group of linears; expected starts=None. Use 'reference'."
        )
    if torch.is_grad_enabled():
        # What Function.apply ends in, without its provisions for torch.func, which is refused.
        y: Tensor = _APPLY(call, backend, call.x, call.base, call.gate, *call.lora_a, *call.lora_b)  # type: ignore[no-untyped-call]
        return y
    return _forward(call, backend)[0]


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


def _check_row_map(row_map: RowMap, x: Tensor) -> None:
    rows = math.prod(x.shape[:-1])
    if row_map.rows != rows:
        raise ValueError(
            f"row_map is for {row_map.rows} rows and x has {rows}; expected as many. Build the row map from this gate, "
            f"or pass none."
        )


# Backend name -> kernel with the signature that `LoraCall` states.
FORWARD: dict[str, Callable[[LoraCall], tuple[Tensor, Tensor]]] = {"reference": reference.multi_lora_forward}
BACKWARD: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]] = {"reference": reference.multi_lora_backward}
if "cpu" in BACKENDS:
    FORWARD["cpu"] = cpu.multi_lora_forward
    BACKWARD["cpu"] = cpu.multi_lora_backward
if "triton" in BACKENDS:
    FORWARD["triton"] = triton_backend.kernel("multi_lora", "multi_lora_forward")
    BACKWARD["triton"] = triton_backend.kernel("multi_lora", "multi_lora_backward")
if "cuda" in BACKENDS:
    FORWARD["cuda"] = cuda.multi_lora_forward
    BACKWARD["cuda"] = cuda.multi_lora_backward
MULTI_LORA = Op("multi_lora", FORWARD)


def _forward(call: LoraCall, backend: str) -> tuple[Tensor, Tensor]:
    # The dtype is settled by the arguments; autocast inside the kernel would contradict the fake implementation.
    if torch.is_autocast_enabled(call.gate.device.type):
        with without_autocast(call.gate.device.type):
            return FORWARD[backend](call)
    return FORWARD[backend](call)


def _backward(
    call: LoraCall, grad: Tensor, shrunk: Tensor | None, wanted: Wanted, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with without_autocast(grad.device.type):
        return BACKWARD[backend](call, grad, shrunk, wanted)


class Saved:
    """What a forward leaves for its derivative, put into an autograd context and taken out again."""

    def __init__(self, ctx: Any, call: LoraCall, shrunk: Tensor, backend: str) -> None:
        x, gate = call.x, call.gate
        assert x is not None
        trainable = []
        for a, b in zip(call.lora_a, call.lora_b, strict=True):
            trainable.append(a.requires_grad or b.requires_grad)
        self.wanted = Wanted(x.requires_grad, gate.requires_grad, trainable)
        self.base_requires_grad = call.base is not None and call.base.requires_grad
        self.x_dtype = x.dtype
        self.settings = (call.scale, call.dropout, call.per_expert)
        self.starts = call.starts
        self.row_map = call.row_map
        self.backend = backend
        # Frozen experts and a constant gate need neither x nor S: holding them would keep whole activations alive.
        learns = any(trainable)
        ctx.save_for_backward(
            x if learns else None, shrunk if learns or gate.requires_grad else None, gate, call.seed,
            *call.lora_a, *call.lora_b,
        )  # fmt: skip

    def gradients(self, ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
        """dx, dg [G, E] and the gradients of all A, then of all B."""
        x, shrunk, gate, seed, *experts = ctx.saved_tensors
        gate = gate.reshape(-1, gate.shape[-1])
        count = len(experts) // 2
        lora_a, lora_b = experts[:count], experts[count:]
        found: list[Tensor | None] = [None] * len(experts)
        wanted = self.wanted
        if not (wanted.x or wanted.gate or any(wanted.experts)):
            return None, None, found
        scale, dropout, per_expert = self.settings
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            dx, da, db, dgate = _BACKWARD_OP(
                grad, x, shrunk, lora_a, lora_b, gate, scale, dropout, per_expert, seed, wanted.x, wanted.gate,
                wanted.experts, self.backend,
            )  # fmt: skip
        else:
            gate_GE = gate.reshape(-1, count)
            call = LoraCall(
                x, None, lora_a, lora_b, gate_GE, scale, dropout, per_expert, seed, wanted.gate, self.row_map,
                starts=self.starts,
            )  # fmt: skip
            dx, da, db, dgate = _backward(call, grad, shrunk, wanted, self.backend)
        chosen = [e for e, flag in enumerate(wanted.experts) if flag]
        if chosen:
            ranks = [lora_a[e].shape[0] for e in chosen]
            for e, part_a, part_b in zip(chosen, da.split(ranks), db.split(ranks), strict=True):
                if self.starts is not None:
                    part_b = part_b[:, self.starts[e] : self.starts[e] + lora_b[e].shape[0]]
                found[e], found[count + e] = part_a.to(lora_a[e].dtype), _transposed(part_b, lora_b[e].dtype)
        return dx.to(self.x_dtype) if wanted.x else None, dgate if wanted.gate else None, found


def _transposed(part_RP: Tensor, dtype: torch.dtype) -> Tensor:
    """dB in lora_b's own layout, cast in the same pass: autograd would copy any other layout once more."""
    return part_RP.t().to(dtype, memory_format=torch.contiguous_format)


class _MultiLora(torch.autograd.Function):
    """The registered op's kernels and derivative without the dispatcher.

    On the way through a registered formula torch flattens and restores the lists of experts in Python: 0.1 ms of the
    0.3 ms that forward and backward of a tiny layer cost (torch 2.13, one thread of a Xeon, 2026-11). What traces or
    watches operations (torch.compile, dispatch modes) still sees the op.
    """

    @staticmethod
    def forward(
        ctx: Any, call: LoraCall, backend: str, x: Tensor, base: Tensor | None, gate: Tensor, *experts: Tensor
    ) -> Tensor:
        autocast = torch.is_autocast_enabled(x.device.type)
        y, shrunk = _forward(call, backend) if autocast else FORWARD[backend](call)
        ctx.saved = Saved(ctx, call, shrunk, backend)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dgate, experts = ctx.saved.gradients(ctx, grad)
        return None, None, dx, grad if ctx.saved.base_requires_grad else None, dgate, *experts


_APPLY = super(torch.autograd.Function, _MultiLora).apply


# The registered op: the same call spelled out, as torch.library wants it.


def _op_forward(
    x: Tensor, base: Tensor | None, lora_a: list[Tensor], lora_b: list[Tensor], gate: Tensor, scale: list[float],
    dropout: float, per_expert: bool, seed: Tensor | None, backend: str, every_column: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call = LoraCall(
        x, base, lora_a, lora_b, gate.reshape(-1, len(scale)), scale, dropout, per_expert, seed, every_column
    )
    return _forward(call, backend)


def _op_backward(
    grad: Tensor, x: Tensor | None, shrunk: Tensor | None, lora_a: list[Tensor], lora_b: list[Tensor], gate: Tensor,
    scale: list[float], dropout: float, per_expert: bool, seed: Tensor | None, need_x: bool, need_gate: bool,
    trainable: list[bool], backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gate_GE = gate.reshape(-1, len(scale))
    call = LoraCall(x, None, lora_a, lora_b, gate_GE, scale, dropout, per_expert, seed, need_gate)
    return _backward(call, grad, shrunk, Wanted(need_x, need_gate, trainable), backend)


def _fake_forward(
    x: Tensor, base: Tensor | None, lora_a: list[Tensor], lora_b: list[Tensor], gate: Tensor, scale: list[float],
    dropout: float, per_expert: bool, seed: Tensor | None, backend: str, every_column: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = x.dtype if base is None else base.dtype
    # math.prod, not Size.numel(): that one makes a constant of a symbolic length, and every length a new graph.
    y = x.new_empty((*x.shape[:-1], lora_b[0].shape[0]), dtype=dtype)
    return y, x.new_empty((math.prod(x.shape[:-1]), sum(a.shape[0] for a in lora_a)), dtype=dtype)


def _fake_backward(
    grad: Tensor, x: Tensor | None, shrunk: Tensor | None, lora_a: list[Tensor], lora_b: list[Tensor], gate: Tensor,
    scale: list[float], dropout: float, per_expert: bool, seed: Tensor | None, need_x: bool, need_gate: bool,
    trainable: list[bool], backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    features, outputs = lora_a[0].shape[1], lora_b[0].shape[0]
    columns = sum(a.shape[0] for a, flag in zip(lora_a, trainable, strict=True) if flag)
    return (
        grad.new_empty((*grad.shape[:-1], features) if need_x else 0),
        grad.new_empty((columns, features) if any(trainable) else 0),
        grad.new_empty((columns, outputs) if any(trainable) else 0),
        gate.new_empty((math.prod(gate.shape[:-1]), gate.shape[-1])) if need_gate else grad.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *operands, backend, every_column = inputs
    call = LoraCall(*operands, every_column)  # type: ignore[call-arg, unused-ignore]
    if call.gate.requires_grad and not every_column:
        raise ValueError(
            "the gate requires grad and every_column is False; expected True, because a gate of zero needs its "
            "gradient. Pass every_column=True or a detached gate."
        )
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.gate_shape = call.gate.shape
    ctx.saved = Saved(ctx, call, output[1], backend)


def _autograd(ctx: Any, grad: Tensor | None, _grad_shrunk: None) -> tuple[Any, ...]:
    saved: Saved = ctx.saved
    count = len(saved.wanted.experts)
    nothing: list[Tensor | None] = [None] * count
    if grad is None:
        return None, None, nothing, list(nothing), None, None, None, None, None, None, None
    dx, dgate, found = saved.gradients(ctx, grad)
    if dgate is not None:
        dgate = dgate.view(ctx.gate_shape)
    dbase = grad if saved.base_requires_grad else None
    return dx, dbase, found[:count], found[count:], dgate, None, None, None, None, None, None


_FORWARD_OP = register_op(
    "multi_lora(Tensor x, Tensor? base, Tensor[] lora_a, Tensor[] lora_b, Tensor gate, float[] scale, float dropout, "
    "bool per_expert, Tensor? seed, str backend, bool every_column) -> (Tensor, Tensor)",
    kernel=_op_forward,
    fake=_fake_forward,
    backward=_autograd,
    setup_context=_setup_context,
)
_BACKWARD_OP = register_op(
    "multi_lora_backward(Tensor grad, Tensor? x, Tensor? shrunk, Tensor[] lora_a, Tensor[] lora_b, Tensor gate, "
    "float[] scale, float dropout, bool per_expert, Tensor? seed, bool need_x, bool need_gate, bool[] trainable, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_op_backward,
    fake=_fake_backward,
)
