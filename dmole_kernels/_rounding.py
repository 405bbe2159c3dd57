# SPDX-License-Identifier: Apache-2.0
"""
    var(sum_k a_k b_k)  =  sum_k (var(a_k) b_k^2 + a_k^2 var(b_k))  +  n v^2 sum_k (a_k b_k)^2  +  u^2 (sum_k a_k b_k)^2

The expected error of a correct kernel, from the operands alone: the same number on every CPU and GPU. Each matrix
product propagates the errors of its operands, adds those of a plain sum of its n terms in the precision v of the
accumulator (float32, or float64 for float64), and rounds its result once to the working dtype (u = eps / 2). Rounding
errors are assumed independent with mean zero, so variances add.

Source: Higham and Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41 (2019): the
error of a sum of n terms grows as sqrt(n) u under this model. Blocked sums, fused multiply-adds and exact
products have smaller errors, so the estimate is too large, by a factor of two to three for the kernels here.

Shape letters: as in `reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmole_kernels._lora_call import LoraCall
from dmole_kernels._philox import dropout_keep_mask


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A matrix in float64 with the variance of the rounding error of each element."""

    value: Tensor
    variance: Tensor

    def t(self) -> Rounded:
        return Rounded(value=self.value.t(), variance=self.variance.t())

    def columns(self, chosen: slice) -> Rounded:
        return Rounded(value=self.value[:, chosen], variance=self.variance[:, chosen])

    def worst_row(self) -> float:
        """The largest expected root mean square error of a row; 0.0 without elements."""
        return float(self.variance.mean(-1).sqrt().max()) if self.variance.numel() else 0.0


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Unit roundoffs of stored values and of sums."""

    stored: float
    summed: float

    @staticmethod
    def of(dtype: torch.dtype) -> Arithmetic:
        accumulator = torch.promote_types(dtype, torch.float32)
        return Arithmetic(stored=torch.finfo(dtype).eps / 2, summed=torch.finfo(accumulator).eps / 2)

    def rounded(self, value: Tensor, variance: Tensor) -> Rounded:
        return Rounded(value=value, variance=variance + (self.stored * value).square())

    def product(self, left: Rounded, right: Rounded, *, more_terms: int = 0, added: Rounded | None = None) -> Rounded:
        """left @ right, plus `added` in the same sum; `more_terms` counts terms that other products add to it."""
        squares = left.value.square() @ right.value.square()
        variance = left.variance @ right.value.square() + left.value.square() @ right.variance
        value = left.value @ right.value
        if added is not None:
            value, variance = value + added.value, variance + added.variance
            squares = squares + added.value.square()
        terms = left.value.shape[1] + more_terms
        return self.rounded(value, variance + terms * self.summed**2 * squares)

    def scaled(self, columns: Rounded, factor: Tensor) -> Rounded:
        """An elementwise product with exact factors; one rounding more than the store, for a product of two of them."""
        value = columns.value * factor
        return self.rounded(value, columns.variance * factor.square() + (self.summed * value).square())


def exact(value: Tensor) -> Rounded:
    return Rounded(value=value.double(), variance=torch.zeros_like(value, dtype=torch.float64))


def product_error(x: Tensor, weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> float:
    """The expected error of the worst row of `x @ weight.T + bias` in `dtype`; operands are exact as given."""
    rows = exact(x.reshape(-1, x.shape[-1]))
    outputs = weight.shape[0]
    added = None if bias is None else exact(bias.expand(rows.value.shape[0], outputs))
    return Arithmetic.of(dtype).product(rows, exact(weight).t(), added=added).worst_row()


def multi_lora_errors(call: LoraCall, grad: Tensor, trainable: Sequence[bool], dtype: torch.dtype) -> dict[str, float]:
    """The expected error of the worst row of each result of multi_lora, by the names of `testing.run_autograd`; `call`
    has the operands, already rounded to `dtype`; the base is ignored: errors are those of the delta alone."""
    assert call.x is not None
    arithmetic = Arithmetic.of(dtype)
    x_ND = call.x.double().reshape(-1, call.x.shape[-1])
    grad_NP = exact(grad.reshape(-1, grad.shape[-1]))
    rows, gates = x_ND.shape[0], call.gate.shape[0]
    ranks = call.ranks
    if rows == 0:
        names = [f"d{matrix}_{e}" for e, flag in enumerate(trainable) if flag for matrix in "ab"]
        return dict.fromkeys(["delta", "dx", "dgate", *names], 0.0)
    scale = torch.tensor(list(call.scale), dtype=torch.float64)
    column_N = [(call.gate.double()[:, e] * scale[e]).repeat_interleave(rows // gates) for e in range(len(ranks))]
    total = sum(ranks)
    found: dict[str, float] = {}
    y = dx = None
    weight_errors: dict[str, float] = {}
    gate_variance = torch.zeros(gates, len(ranks), dtype=torch.float64)
    for e, (a, b) in enumerate(zip(call.lora_a, call.lora_b, strict=True)):
        keep_ND = torch.ones_like(x_ND)
        if call.seed is not None:
            stream = e if call.per_expert else 0
            keep = dropout_keep_mask(int(call.seed), rows, x_ND.shape[1], call.dropout, stream=stream)
            keep_ND = keep.double() / (1.0 - call.dropout)
        x_hat = Rounded(value=x_ND * keep_ND, variance=torch.zeros_like(x_ND))
        factor = column_N[e][:, None]
        shrunk = arithmetic.product(x_hat, exact(a).t())
        gated = arithmetic.scaled(shrunk, factor)
        y = arithmetic.product(gated, exact(b).t(), more_terms=total - ranks[e], added=y)
        expanded = arithmetic.product(grad_NP, exact(b))
        gated_grad = arithmetic.scaled(expanded, factor)
        own = arithmetic.product(gated_grad, exact(a), more_terms=total - ranks[e])
        own = Rounded(value=own.value * keep_ND, variance=own.variance * keep_ND.square())
        dx = own if dx is None else Rounded(value=dx.value + own.value, variance=dx.variance + own.variance)
        if trainable[e]:
            weight_errors[f"da_{e}"] = arithmetic.product(gated_grad.t(), x_hat).worst_row()
            weight_errors[f"db_{e}"] = arithmetic.product(grad_NP.t(), gated).worst_row()
        product = expanded.value * shrunk.value
        variance = expanded.variance * shrunk.value.square() + expanded.value.square() * shrunk.variance
        terms = rows // gates * max(1, ranks[e])
        variance = variance + terms * arithmetic.summed**2 * product.square()
        per_gate = variance.sum(1).view(gates, -1).sum(1) * scale[e] ** 2
        sums = product.sum(1).view(gates, -1).sum(1) * scale[e]
        gate_variance[:, e] = per_gate + (arithmetic.stored * sums).square()
    assert y is not None and dx is not None
    found["delta"] = y.worst_row()
    found["dx"] = arithmetic.rounded(dx.value, dx.variance).worst_row()
    found["dgate"] = float(gate_variance.mean(1).sqrt().max())
    return found | weight_errors
