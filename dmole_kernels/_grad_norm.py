# SPDX-License-Identifier: Apache-2.0
"""
    norm[b] = || sum_t g[b, t] x[b, t]^T ||_F        the Frobenius norm of a linear layer's weight gradient, per sample

from the input x and the output gradient g of the layer, without storing the p x d gradient:

    direct    sqrt(sum((G^T X)^2)), tile by tile                      2 T p d flops
    ghost     sqrt(sum_{t,t'} (x_t . x_t') (g_t . g_t'))              2 T^2 (p + d), half of it beyond one tile
    sketch    || L^T M R ||_F,  M = sum over batches of G^T X,  L [p, k] and R [d, k] ~ N(0, 1/k)

Three quantities: `per_sample` (above), `per_batch` (one sample made of all tokens) and `accumulated` (the norm of the
sum over many batches: D-MoLE's score, arXiv 2506.11672 Eq. 3), the last exact (one p x d buffer) or sketched.

Source: ghost norm, Goodfellow, "Efficient per-example gradient computations", arXiv 1510.01799, extended to sequences
by Li et al., arXiv 2110.05679.

Shape letters: B samples, T tokens, N = B T rows, D in_features, P out_features, K and L sketch sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, Literal

import torch
from torch import Tensor

from dmole_kernels import cpu, reference, triton_backend
from dmole_kernels._argument_checks import check_floating, check_one_device
from dmole_kernels._backend import BACKENDS, Op, without_autocast
from dmole_kernels._registration import refuse_transforms, register_op

NormMethod = Literal["auto", "direct", "ghost"]


def grad_norm_per_sample(x: Tensor, grad: Tensor, *, method: NormMethod = "auto", backend: str = "auto") -> Tensor:
    """Weight-gradient norm of every sample, [B]: `(grad[b].T @ x[b]).norm()` for each b.

    Args:
        x: [B, T, in_features], the input of the layer.
        grad: [B, T, out_features], the gradient of the layer's output. Rows of padding must be zero here.
        method: "auto" chooses the cheaper method for these shapes at each call (`cheaper_method`); the cpu backend
            chooses for each sample, after skipping leading and trailing tokens whose gradient is zero (padding).
        backend: see `choose_backend`.

    Returns:
        [B], float64 if x or grad is float64, else float32. Computes in that dtype: Gram tiles in bfloat16 would have a
        relative error of 1.1e-3. Differentiable in x and grad; where the norm is zero, its gradient is zero. On the cpu
        backend, the norm of a sample is bitwise independent of the other samples and of the amount of padding.

    Raises:
        ValueError: if the shapes or devices do not match, or the method or the backend is not available.
        NotImplementedError: under a torch.func transform or in forward-mode differentiation.
    """
    _check(x, grad, "[samples, tokens, features]")
    if method not in ("auto", "direct", "ghost"):
        raise ValueError(
            f"method={method!r}; expected 'auto', 'direct' or 'ghost'. Use 'auto' unless you compare them."
        )
    refuse_transforms("grad_norm_per_sample")
    name = GRAD_NORM.pick(backend, x.device.type, torch.promote_types(x.dtype, grad.dtype))
    chosen: str = method
    if method == "auto" and "auto" not in NORM[name]:
        chosen = cheaper_method(x.shape[1], x.shape[2], grad.shape[2], backend=name)
    norm: Tensor = _NORM_OP(x, grad, chosen, name)
    return norm


def grad_norm_per_batch(x: Tensor, grad: Tensor, *, method: NormMethod = "auto", backend: str = "auto") -> Tensor:
    """Weight-gradient norm of the whole batch, a scalar: `(grad.T @ x).norm()` over all rows of x [..., D].

    Arguments, dtypes and errors are those of `grad_norm_per_sample`; x is [..., in_features], grad [..., out_features].
    """
    _check(x, grad, "[..., features]")
    x_1ND, grad_1NP = x.reshape(1, -1, x.shape[-1]), grad.reshape(1, -1, grad.shape[-1])
    return grad_norm_per_sample(x_1ND, grad_1NP, method=method, backend=backend)[0]


def cheaper_method(
    tokens: int, in_features: int, out_features: int, *, backend: str = "auto"
) -> Literal["direct", "ghost"]:
    """The method that "auto" chooses for a sample of these shapes, by the number of floating-point operations.

    It is "ghost" up to about T = d p / (d + p), or up to twice that where symmetry saves half of the work. How much
    symmetry saves depends on the tile size, which differs between backends.
    """
    chosen = GRAD_NORM.pick("auto", "cpu", None) if backend == "auto" else backend
    if chosen == "cpu":
        name = cpu.extension().grad_norm_method(tokens, in_features, out_features)
        return "ghost" if name == "ghost" else "direct"
    tiles = -(-tokens // reference.GHOST_TILE)
    computed_fraction = (tiles + 1) / (2 * tiles) if tiles else 1.0
    ghost = computed_fraction * tokens * tokens * (in_features + out_features)
    return "ghost" if ghost < tokens * in_features * out_features else "direct"


def accumulate_gradient(buffer: Tensor, x: Tensor, grad: Tensor, *, backend: str = "auto") -> None:
    """Adds the weight gradient of one batch in place: `buffer += grad.T @ x`.

    Args:
        buffer: [out_features, in_features], modified in place; float32 keeps small batches from being rounded away.
        x: [N, in_features], the input of the layer.
        grad: [N, out_features], the gradient of the layer's output.
        backend: see `choose_backend`.

    Raises:
        ValueError: if the shapes or devices do not match, or the backend is not available.
        NotImplementedError: under a torch.func transform or in forward-mode differentiation.
    """
    _check(x, grad, "[rows, features]")
    _check_buffer("buffer", buffer, (grad.shape[-1], x.shape[-1]), x)
    refuse_transforms("accumulate_gradient")
    dtype = _asked_dtype(x, grad, buffer)
    name = ACCUMULATE_GRADIENT.pick(backend, x.device.type, dtype)
    _ACCUMULATE_OP(buffer, x, grad, name)


def accumulate_sketch(
    sketch: Tensor, x: Tensor, grad: Tensor, left: Tensor, right: Tensor, *, backend: str = "auto"
) -> None:
    """Adds the sketched weight gradient of one batch in place: `sketch += left.T @ (grad.T @ x) @ right`.

    Args:
        sketch: [k, l], modified in place.
        x: [N, in_features], the input of the layer.
        grad: [N, out_features], the gradient of the layer's output.
        left: [out_features, k], drawn from N(0, 1/k).
        right: [in_features, l], drawn from N(0, 1/l). With these draws `E[sum(sketch^2)]` is the squared norm.
        backend: see `choose_backend`.

    At k = l = 64 and d = p = 1024 it costs about 13 % of the operations of the direct method, and 16 KiB instead of
    4 MiB. Sketches that use the same left and right can be summed over batches and processes.

    Raises:
        ValueError: if the shapes or devices do not match, or the backend is not available.
        NotImplementedError: under a torch.func transform or in forward-mode differentiation.
    """
    _check(x, grad, "[rows, features]")
    sides = ((left, grad), (right, x))
    if any(side.dim() != 2 or side.shape[0] != tensor.shape[1] for side, tensor in sides):
        raise ValueError(
            f"left has shape {tuple(left.shape)} and right {tuple(right.shape)}; expected [{grad.shape[1]}, k] and "
            f"[{x.shape[1]}, l]. Draw left for grad's width and right for x's."
        )
    check_one_device(x=x, left=left, right=right)
    _check_buffer("sketch", sketch, (left.shape[1], right.shape[1]), x)
    refuse_transforms("accumulate_sketch")
    dtype = _asked_dtype(x, grad, sketch, left, right)
    name = ACCUMULATE_SKETCH.pick(backend, x.device.type, dtype)
    _SKETCH_OP(sketch, x, grad, left, right, name)


def sketch_relative_std(sketch: Tensor) -> float:
    """Estimated relative standard deviation of `sketch.norm()` as an estimate of the gradient's norm.

    With a = ||M M^T||_F^2 / ||M||_F^4 (1 for rank one, 1/rank for a flat spectrum):
    `Var ||Y||^2 / ||M||^4 = 2 a / k + 2 (a (1 + 1/k) + 1/k) / l`. a is estimated from the sketch, which overestimates
    it by about 1/k + 1/l, so the result is an overestimate too; at 64 x 64 it is at most 0.13.
    """
    left, right = sketch.shape
    total = float(sketch.double().square().sum())
    if total == 0.0:
        return 0.0
    flatness = min(1.0, float((sketch.double() @ sketch.double().t()).square().sum()) / total**2)
    variance = 2 * flatness / left + 2 * (flatness * (1 + 1 / left) + 1 / left) / right
    return 0.5 * math.sqrt(variance)


def _check(x: Tensor, grad: Tensor, letters: str) -> None:
    dimensions = None if "..." in letters else letters.count(",") + 1
    wrong = x.dim() == 0 or grad.dim() == 0 or (dimensions is not None and x.dim() != dimensions)
    if wrong or x.shape[:-1] != grad.shape[:-1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and grad {tuple(grad.shape)}; expected {letters} for both, equal but for "
            f"the last. Reshape them, e.g. x.reshape(-1, x.shape[-1]) for rows."
        )
    check_one_device(x=x, grad=grad)


def _check_buffer(name: str, buffer: Tensor, expected: tuple[int, int], x: Tensor) -> None:
    if tuple(buffer.shape) != expected:
        raise ValueError(
            f"{name} has shape {tuple(buffer.shape)}; expected {expected}. Allocate torch.zeros{expected}."
        )
    check_floating(**{name: buffer})
    check_one_device(**{"x": x, name: buffer})


# By backend, then by method: squared norms [B], in float32 at least.
NORM: dict[str, dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "reference": {
        "direct": lambda x, grad: reference.squared_norm_direct(*_widened(x, grad)),
        "ghost": lambda x, grad: reference.squared_norm_ghost(*_widened(x, grad)),
    }
}
ACCUMULATE: dict[str, Callable[..., None]] = {"reference": reference.accumulate_gradient}
SKETCH: dict[str, Callable[..., None]] = {"reference": reference.accumulate_sketch}
if "cpu" in BACKENDS:
    NORM["cpu"] = {
        method: partial(torch.ops.dmole_kernels.cpu_squared_norm, method=method)
        for method in ("auto", "direct", "ghost")
    }
    ACCUMULATE["cpu"] = torch.ops.dmole_kernels.cpu_accumulate_gradient
    SKETCH["cpu"] = torch.ops.dmole_kernels.cpu_accumulate_sketch
if "triton" in BACKENDS:
    NORM["triton"] = {
        "direct": triton_backend.kernel("grad_norm", "squared_norm_direct"),
        "ghost": triton_backend.kernel("grad_norm", "squared_norm_ghost"),
    }
    ACCUMULATE["triton"] = triton_backend.kernel("grad_norm", "accumulate_gradient")
    SKETCH["triton"] = triton_backend.kernel("grad_norm", "accumulate_sketch")
GRAD_NORM = Op("grad_norm_per_sample", NORM)
ACCUMULATE_GRADIENT = Op("accumulate_gradient", ACCUMULATE)
ACCUMULATE_SKETCH = Op("accumulate_sketch", SKETCH)


def _asked_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that a backend must support: float16 where a tensor has it, whatever the sums are; else the widest."""
    dtypes = [tensor.dtype for tensor in tensors]
    return torch.float16 if torch.float16 in dtypes else reduce(torch.promote_types, dtypes)


def _widened(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(x.dtype, grad.dtype), torch.float32)
    return x.to(dtype), grad.to(dtype)


def _norm(x: Tensor, grad: Tensor, method: str, backend: str) -> Tensor:
    with without_autocast(x.device.type):
        return NORM[backend][method](x, grad).sqrt_()


def _accumulate(buffer: Tensor, x: Tensor, grad: Tensor, backend: str) -> None:
    with without_autocast(x.device.type):
        ACCUMULATE[backend](buffer, x, grad)


def _sketch(sketch: Tensor, x: Tensor, grad: Tensor, left: Tensor, right: Tensor, backend: str) -> None:
    with without_autocast(x.device.type):
        SKETCH[backend](sketch, x, grad, left, right)


def _norm_fake(x: Tensor, grad: Tensor, method: str, backend: str) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(x.dtype, grad.dtype), torch.float32)
    return x.new_empty(x.shape[0], dtype=dtype)


def _accumulate_fake(buffer: Tensor, x: Tensor, grad: Tensor, backend: str) -> None:
    return None


def _sketch_fake(sketch: Tensor, x: Tensor, grad: Tensor, left: Tensor, right: Tensor, backend: str) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output)


def _autograd(ctx: Any, dnorm_B: Tensor) -> tuple[Tensor, Tensor, None, None]:
    x, grad, norm_B = ctx.saved_tensors
    dx, dgrad = _gradients(x, grad, norm_B, dnorm_B)
    return dx.to(x.dtype), dgrad.to(grad.dtype), None, None


def _gradients(x: Tensor, grad: Tensor, norm_B: Tensor, dnorm_B: Tensor) -> tuple[Tensor, Tensor]:
    """With M = G^T X: dX = G M / norm = (G G^T) X / norm and dG = X M^T / norm = (X X^T) G / norm."""
    factor_B11 = torch.where(norm_B > 0, dnorm_B / norm_B, torch.zeros_like(norm_B))[:, None, None]
    x_BTD, grad_BTP = x.to(norm_B.dtype), grad.to(norm_B.dtype)
    dx = (grad_BTP @ grad_BTP.transpose(1, 2)) @ x_BTD * factor_B11
    dgrad = (x_BTD @ x_BTD.transpose(1, 2)) @ grad_BTP * factor_B11
    return dx, dgrad


_NORM_OP = register_op(
    "grad_norm_per_sample(Tensor x, Tensor grad, str method, str backend) -> Tensor",
    kernel=_norm,
    fake=_norm_fake,
    backward=_autograd,
    setup_context=_setup_context,
)
_ACCUMULATE_OP = register_op(
    "accumulate_gradient(Tensor(a!) buffer, Tensor x, Tensor grad, str backend) -> ()",
    kernel=_accumulate,
    fake=_accumulate_fake,
)
_SKETCH_OP = register_op(
    "accumulate_sketch(Tensor(a!) sketch, Tensor x, Tensor grad, Tensor left, Tensor right, str backend) -> ()",
    kernel=_sketch,
    fake=_sketch_fake,
)
