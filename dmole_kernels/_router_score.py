# SPDX-License-Identifier: Apache-2.0
"""
    error[n, t] = mean_d (f(Wd[t] relu(We[t] z[n] + be[t]) + bd[t])_d - z[n, d])^2          f = sigmoid or identity
    gate[n, t]  = 1 if error[n, t] <= threshold[t] and fewer than k such tasks have a smaller error, else 0

The autoencoder router: reconstruction error of every sample under every task's autoencoder, and the tasks it selects.

Source: D-MoLE (arXiv 2506.11672) Eq. 9 (error), Eq. 10 to 12 (threshold, order, best k); section 1.4 of its method.

Shape letters: N samples, T tasks, D features, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from dmole_kernels import reference, triton_backend
from dmole_kernels._argument_checks import check_floating, check_one_device, dtype_name
from dmole_kernels._backend import BACKENDS, Op, without_autocast
from dmole_kernels._registration import refuse_transforms, register_op


def router_score(
    features: Tensor, encoder_weight: Tensor, encoder_bias: Tensor, decoder_weight: Tensor, decoder_bias: Tensor, *,
    decoder: Literal["sigmoid", "linear"] = "sigmoid", backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Mean squared reconstruction error per sample and task, [N, T]; differentiable in every tensor.

    Args:
        features: [N, D].
        encoder_weight: [T, H, D], stacked `nn.Linear` weights; encoder_bias [T, H].
        decoder_weight: [T, D, H]; decoder_bias [T, D].
        decoder: "sigmoid" as in the paper, or "linear", which can reach the negative entries of a feature.
        backend: see `choose_backend`.

    All tensors have one dtype. A sample's errors do not depend on the other samples: bit for bit on the cpu backend,
    which computes one block of one task's reconstruction at a time; up to rounding on the reference.

    Raises:
        ValueError: for shapes, dtypes or devices that do not match or an unknown decoder.
        NotImplementedError: under a torch.func transform or in forward-mode differentiation.
    """
    _check(features, encoder_weight, encoder_bias, decoder_weight, decoder_bias)
    if decoder not in ("sigmoid", "linear"):
        raise ValueError(f"decoder={decoder!r}; expected 'sigmoid' or 'linear'. Use 'sigmoid' for the paper's.")
    tensors = (features, encoder_weight, encoder_bias, decoder_weight, decoder_bias)
    refuse_transforms("router_score")
    name = ROUTER_SCORE.pick(backend, features.device.type, features.dtype)
    error: Tensor = _SCORE_OP(*tensors, decoder == "sigmoid", name)
    return error


def router_select(error: Tensor, threshold: Tensor, *, top_k: int = 2, backend: str = "auto") -> Tensor:
    """Gate [N, T] of 0 and 1 in error's dtype: tasks at or under their threshold, lowest errors first, at most `top_k`.

    Of equal errors, the earlier task is first. A row of zeros means that no task is selected and the sample uses the
    base model. An
    infinite error is selected under an infinite threshold, a NaN error never.

        error     = [[0.1, 0.3, 0.2],    threshold = [0.25, 0.4, 0.25], top_k = 2:    gate = [[1, 0, 1],
                     [0.5, 0.3, 0.6]]                                                         [0, 1, 0]]
    """
    if error.dim() != 2 or threshold.shape != error.shape[1:]:
        raise ValueError(
            f"error has shape {tuple(error.shape)} and threshold {tuple(threshold.shape)}; expected [samples, tasks] "
            f"and [tasks]. Give each task one threshold."
        )
    check_floating(error=error, threshold=threshold)
    check_one_device(error=error, threshold=threshold)
    if top_k < 1:
        raise ValueError(f"top_k={top_k}; expected at least 1. The paper's is 2.")
    if not torch.compiler.is_compiling() and bool(threshold.isnan().any()):
        tasks = threshold.isnan().nonzero().flatten().tolist()
        raise ValueError(
            f"threshold is NaN for tasks {tasks}; expected numbers, or -inf for a task that is never to be chosen. "
            f"Calibrate those tasks again."
        )
    refuse_transforms("router_select")
    name = ROUTER_SELECT.pick(backend, error.device.type, torch.promote_types(error.dtype, threshold.dtype))
    gate: Tensor = _SELECT_OP(error, threshold, top_k, name)
    return gate


def _check(
    features: Tensor, encoder_weight: Tensor, encoder_bias: Tensor, decoder_weight: Tensor, decoder_bias: Tensor
) -> None:
    if features.dim() != 2 or encoder_weight.dim() != 3:
        raise ValueError(
            f"features has shape {tuple(features.shape)} and encoder_weight {tuple(encoder_weight.shape)}; expected "
            f"[samples, features] and [tasks, hidden, features]. Stack the tasks' weights in dimension 0."
        )
    tasks, hidden, width = encoder_weight.shape
    for name, tensor, expected in (
        ("features", features, (features.shape[0], width)),
        ("encoder_bias", encoder_bias, (tasks, hidden)),
        ("decoder_weight", decoder_weight, (tasks, width, hidden)),
        ("decoder_bias", decoder_bias, (tasks, width)),
    ):
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected {expected} beside encoder_weight "
                f"{tuple(encoder_weight.shape)}. Stack the tasks' tensors in dimension 0."
            )
    tensors = {
        "features": features,
        "encoder_weight": encoder_weight,
        "encoder_bias": encoder_bias,
        "decoder_weight": decoder_weight,
        "decoder_bias": decoder_bias,
    }
    check_floating(features=features)
    check_one_device(**tensors)
    for name, tensor in tensors.items():
        if tensor.dtype != features.dtype:
            raise ValueError(
                f"{name} is {dtype_name(tensor.dtype)} and features {dtype_name(features.dtype)}; expected one dtype. "
                f"Cast the autoencoders or the features."
            )


SCORE: dict[str, Callable[..., Tensor]] = {"reference": reference.router_score_forward}
SCORE_BACKWARD = {"reference": reference.router_score_backward}
SELECT: dict[str, Callable[..., Tensor]] = {"reference": reference.router_select}
if "cpu" in BACKENDS:
    SCORE["cpu"] = torch.ops.dmole_kernels.cpu_router_score
    # The derivative of the reference: scores are computed under no_grad and autoencoders are trained one at a time, so
    # its speed does not matter.
    SCORE_BACKWARD["cpu"] = reference.router_score_backward
    SELECT["cpu"] = torch.ops.dmole_kernels.cpu_router_select
if "triton" in BACKENDS:
    SCORE["triton"] = triton_backend.kernel("router_score", "router_score_forward")
    SCORE_BACKWARD["triton"] = reference.router_score_backward
ROUTER_SCORE = Op("router_score", SCORE)
ROUTER_SELECT = Op("router_select", SELECT)


def _score(
    features: Tensor, encoder_weight: Tensor, encoder_bias: Tensor, decoder_weight: Tensor, decoder_bias: Tensor,
    sigmoid: bool, backend: str,
) -> Tensor:  # fmt: skip
    with without_autocast(features.device.type):
        return SCORE[backend](features, encoder_weight, encoder_bias, decoder_weight, decoder_bias, sigmoid)


def _score_backward(
    grad: Tensor, features: Tensor, encoder_weight: Tensor, encoder_bias: Tensor, decoder_weight: Tensor,
    decoder_bias: Tensor, sigmoid: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with without_autocast(features.device.type):
        return SCORE_BACKWARD[backend](
            grad, features, encoder_weight, encoder_bias, decoder_weight, decoder_bias, sigmoid
        )


def _select(error: Tensor, threshold: Tensor, top_k: int, backend: str) -> Tensor:
    return SELECT[backend](error, threshold, top_k)


def _score_fake(
    features: Tensor, encoder_weight: Tensor, encoder_bias: Tensor, decoder_weight: Tensor, decoder_bias: Tensor,
    sigmoid: bool, backend: str,
) -> Tensor:  # fmt: skip
    return features.new_empty((features.shape[0], encoder_weight.shape[0]))


def _score_backward_fake(
    grad: Tensor, features: Tensor, encoder_weight: Tensor, encoder_bias: Tensor, decoder_weight: Tensor,
    decoder_bias: Tensor, sigmoid: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    tensors = (features, encoder_weight, encoder_bias, decoder_weight, decoder_bias)
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)


def _select_fake(error: Tensor, threshold: Tensor, top_k: int, backend: str) -> Tensor:
    return error.new_empty(error.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.sigmoid, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Hidden values are computed again: they are T times the features, and cheap.
    grads = _SCORE_BACKWARD_OP(grad, *ctx.saved_tensors, ctx.sigmoid, ctx.backend)
    return (*grads, None, None)


def _select_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # A step function: flat wherever it has a derivative.
    ctx.mark_non_differentiable(output)


def _select_backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
    return None, None, None, None


_TENSORS = "Tensor features, Tensor encoder_weight, Tensor encoder_bias, Tensor decoder_weight, Tensor decoder_bias"
_SCORE_OP = register_op(
    f"router_score({_TENSORS}, bool sigmoid, str backend) -> Tensor",
    kernel=_score,
    fake=_score_fake,
    backward=_autograd,
    setup_context=_setup_context,
)
_SCORE_BACKWARD_OP = register_op(
    f"router_score_backward(Tensor grad, {_TENSORS}, bool sigmoid, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_score_backward,
    fake=_score_backward_fake,
)
_SELECT_OP = register_op(
    "router_select(Tensor error, Tensor threshold, int top_k, str backend) -> Tensor",
    kernel=_select,
    fake=_select_fake,
    backward=_select_backward,
    setup_context=_select_context,
)
