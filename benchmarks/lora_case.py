# SPDX-License-Identifier: Apache-2.0
"""Shapes of multi-expert LoRA calls, their tensors, and the minimum of flops and bytes that they need.

    added flops   forward 2 (D + P) sum_e n_e r_e; backward as much for dS and dx, and as much for dA and dB together
                  where all experts are trainable             n_e rows with a gate for expert e
    added bytes   forward b (ND + NP + NP + 2 NR + R(D + P)); backward b (2 NP + 3 ND + 4 NR + 2 R(D + P))

The bytes are those of a kernel beside a finished base product (PyTorch's): y is read and written once more.
R counts the experts that some row uses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from dmole_kernels.testing import LoraInputs

Direction = Literal["forward", "forward_backward"]


@dataclass(frozen=True, kw_only=True)
class LoraCase:
    """`samples` x `tokens` rows. Gates are 1 for `top` experts of each sample (or token), or a softmax where top is 0.

    popularity: how experts are drawn: "uniform", "zipf" (expert e with weight 1 / (e + 1)) or "one_hot" (all samples
    use the first `top`). trainable: "all", or "last" (old experts are frozen beside the new one).
    """

    name: str
    samples: int
    tokens: int
    in_features: int
    out_features: int
    ranks: tuple[int, ...]
    top: int = 2
    popularity: Literal["uniform", "zipf", "one_hot"] = "uniform"
    level: Literal["sample", "token"] = "sample"
    trainable: Literal["all", "last"] = "all"
    dropout: float = 0.0

    @property
    def rows(self) -> int:
        return self.samples * self.tokens

    def limited(self, rows: int) -> LoraCase:
        """The same case with about that many rows at most."""
        tokens = min(self.tokens, rows)
        return replace(self, tokens=tokens, samples=max(1, min(self.samples, rows // tokens)))


@dataclass(frozen=True, kw_only=True)
class LoraProblem:
    """`inputs` with the base's weight [P, D]; experts' weights in the working dtype, gates in float32."""

    case: LoraCase
    inputs: LoraInputs
    weight: Tensor

    @cached_property
    def gate_NE(self) -> Tensor:
        """One gate row for each row of x."""
        gate_GE = self.inputs.gate.reshape(-1, len(self.case.ranks))
        return gate_GE.repeat_interleave(self.case.rows // gate_GE.shape[0], 0)

    @cached_property
    def active(self) -> tuple[int, ...]:
        """Experts that some row uses."""
        return tuple((self.inputs.gate != 0).flatten(0, -2).any(0).nonzero().flatten().tolist())

    @cached_property
    def hard(self) -> bool:
        """Whether all gates are 0 or 1: a loop over experts then needs no product with them."""
        return bool(((self.inputs.gate == 0) | (self.inputs.gate == 1)).all())

    def rows_of(self, expert: int) -> Tensor:
        return self.gate_NE[:, expert].nonzero().flatten()

    def base_flops(self, direction: Direction) -> float:
        """x W^T, and dY W in backward (W is frozen)."""
        product = 2.0 * self.case.rows * self.weight.numel()
        return product if direction == "forward" else 2 * product

    def added_flops(self, direction: Direction) -> float:
        used = [(e, float((self.gate_NE[:, e] != 0).sum()) * self.case.ranks[e]) for e in self.active]
        forward = 2.0 * sum(self.weight.shape) * sum(pairs for _, pairs in used)
        if direction == "forward":
            return forward
        weight_gradients = 2.0 * sum(self.weight.shape) * sum(pairs for e, pairs in used if self.inputs.trainable[e])
        return 2 * forward + weight_gradients

    def base_bytes(self, direction: Direction) -> float:
        """Operands and result of each of the base's products, once."""
        n, (p, d) = self.case.rows, self.weight.shape
        product = float(self.weight.element_size() * (n * d + d * p + n * p))
        return product if direction == "forward" else 2 * product

    def added_bytes(self, direction: Direction) -> float:
        n, (p, d) = self.case.rows, self.weight.shape
        r = sum(self.case.ranks[e] for e in self.active)
        forward = n * d + 2 * n * p + 2 * n * r + r * (d + p)
        backward = 2 * n * p + 3 * n * d + 4 * n * r + 2 * r * (d + p)
        return float(self.weight.element_size() * (forward if direction == "forward" else forward + backward))


def make_gate(case: LoraCase, generator: torch.Generator) -> Tensor:
    """[S, E] or [S, T, E], float32."""
    experts = len(case.ranks)
    leading = (case.samples, case.tokens) if case.level == "token" else (case.samples,)
    if case.top == 0:
        return torch.softmax(torch.randn(*leading, experts, generator=generator), -1)
    count = case.samples * (case.tokens if case.level == "token" else 1)
    if case.popularity == "one_hot":
        chosen = torch.arange(case.top).expand(count, case.top)
    else:
        likely = torch.ones(experts) if case.popularity == "uniform" else 1.0 / torch.arange(1, experts + 1)
        chosen = torch.multinomial(likely.expand(count, experts), case.top, generator=generator)
    return torch.zeros(count, experts).scatter_(1, chosen, 1.0).view(*leading, experts)


def make_problem(
    case: LoraCase, dtype: torch.dtype, *, seed: int = 0, zero_base: bool = False, device: torch.device | str = "cpu"
) -> LoraProblem:
    """Tensors drawn in float32 on the CPU and rounded once. `zero_base`: W = 0, so that y is the LoRA delta alone."""
    if not 0 <= case.top <= len(case.ranks):
        raise ValueError(f"{case.name}: top is {case.top}; expected 0 (dense) to {len(case.ranks)}, its experts.")
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    d, p = case.in_features, case.out_features
    weight = torch.zeros(p, d, dtype=dtype, device=device) if zero_base else draw(p, d, scale=d**-0.5)
    last = len(case.ranks) - 1
    inputs = LoraInputs(
        x=draw(case.samples, case.tokens, d),
        lora_a=tuple(draw(rank, d, scale=d**-0.5) for rank in case.ranks),
        lora_b=tuple(draw(p, rank, scale=rank**-0.5) for rank in case.ranks),
        gate=make_gate(case, generator).to(device),
        scale=tuple(2.0 / (1 + e % 4) for e in range(len(case.ranks))),
        grad=draw(case.samples, case.tokens, p),
        trainable=tuple(case.trainable == "all" or e == last for e in range(len(case.ranks))),
        dropout=case.dropout,
    )
    return LoraProblem(case=case, inputs=inputs, weight=weight)
