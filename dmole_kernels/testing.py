# SPDX-License-Identifier: Apache-2.0
"""
    accepted  <=>  worst_row(kernel - truth) <= 2 expected        worst_row(e) = max_n rms(e[n, :])

The workloads, the oracle and the error rule of tests and benchmarks. Truth is the oracle in float64 on the same
(already rounded) inputs. `expected` is the error that rounding analysis gives for these inputs (`_rounding`): the same
number on every machine, independent of its BLAS. The rule applies to every output and gradient, and to the LoRA delta
ALONE: added to the base layer's output, a missing expert can be smaller than bfloat16 rounding (of 15 broken kernels
the same rule on base + delta caught 8 to 12).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.utils import deterministic

from dmole_kernels import cpu, reference, triton_backend
from dmole_kernels._backend import BACKENDS, DTYPES
from dmole_kernels._lora_call import LoraCall, Wanted
from dmole_kernels._multi_lora import multi_lora
from dmole_kernels._philox import dropout_keep_mask
from dmole_kernels._rounding import multi_lora_errors
from dmole_kernels._rounding import product_error as product_error

Results = dict[str, Tensor]

# A kernel's worst of many rows against the expected error of the worst one.
FACTOR = 2.0


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Shapes and switches of one multi-LoRA call; `leading` are x's dimensions before its features."""

    name: str
    leading: tuple[int, ...]
    in_features: int
    out_features: int
    ranks: tuple[int, ...]
    gate: Literal["sample", "token"] = "sample"
    pattern: Literal["random", "top2", "one_expert", "last_unused", "zero_and_negative"] = "random"
    frozen: tuple[int, ...] = ()
    dropout: float = 0.0
    per_expert: bool = False
    contiguous: bool = True


WORKLOADS = (
    Workload(name="one_row", leading=(1, 1), in_features=8, out_features=8, ranks=(2,)),
    Workload(name="zero_rows", leading=(0, 5), in_features=8, out_features=6, ranks=(2, 3), dropout=0.1),
    Workload(name="zero_tokens", leading=(2, 0), in_features=8, out_features=6, ranks=(2, 3)),
    Workload(name="primes", leading=(3, 7), in_features=37, out_features=53, ranks=(1, 5, 128)),
    Workload(name="token_gates", leading=(3, 7), in_features=31, out_features=17, ranks=(3, 8), gate="token"),
    Workload(name="image_grid", leading=(2, 3, 5), in_features=24, out_features=40, ranks=(4, 4)),
    Workload(name="two_dimensions", leading=(13,), in_features=19, out_features=23, ranks=(7, 1)),
    Workload(
        name="all_frozen", leading=(4, 6), in_features=32, out_features=16, ranks=(4, 8), frozen=(0, 1), dropout=0.2
    ),
    Workload(name="frozen_between", leading=(4, 6), in_features=32, out_features=16, ranks=(4, 8, 2), frozen=(1,)),
    Workload(
        name="old_and_new", leading=(8, 11), in_features=48, out_features=48, ranks=(8, 8), frozen=(0,), dropout=0.05
    ),
    Workload(
        name="zero_and_negative",
        leading=(5, 4),
        in_features=16,
        out_features=24,
        ranks=(4, 6),
        pattern="zero_and_negative",
    ),
    Workload(
        name="one_active_expert",
        leading=(5, 4),
        in_features=16,
        out_features=24,
        ranks=(4, 6, 2),
        pattern="one_expert",
    ),
    Workload(
        name="last_unused",
        leading=(5, 4),
        in_features=16,
        out_features=24,
        ranks=(4, 6),
        pattern="last_unused",
    ),
    Workload(name="dropout_shared", leading=(6, 9), in_features=130, out_features=20, ranks=(4, 3), dropout=0.3),
    Workload(
        name="dropout_per_expert",
        leading=(6, 9),
        in_features=70,
        out_features=20,
        ranks=(4, 3),
        frozen=(0,),
        dropout=0.3,
        per_expert=True,
    ),
    Workload(
        name="strided_x", leading=(4, 5), in_features=33, out_features=12, ranks=(4, 5), dropout=0.1, contiguous=False
    ),
    Workload(
        name="sixteen_top2", leading=(16, 3), in_features=64, out_features=64, ranks=(1, 2, 4, 8) * 4, pattern="top2"
    ),
)


@dataclass(frozen=True, kw_only=True)
class LoraInputs:
    """The arguments of one call, and the gradient of its output."""

    x: Tensor
    lora_a: tuple[Tensor, ...]
    lora_b: tuple[Tensor, ...]
    gate: Tensor
    scale: tuple[float, ...]
    grad: Tensor
    trainable: tuple[bool, ...]
    dropout: float = 0.0
    per_expert: bool = False
    seed: Tensor = field(default_factory=lambda: torch.tensor(0))

    def to(self, dtype: torch.dtype) -> LoraInputs:
        return replace(
            self,
            x=self.x.to(dtype),
            lora_a=tuple(a.to(dtype) for a in self.lora_a),
            lora_b=tuple(b.to(dtype) for b in self.lora_b),
            gate=self.gate.to(dtype),
            grad=self.grad.to(dtype),
        )

    def call(self, base: Tensor | None = None, *, every_column: bool = True) -> LoraCall:
        """The call of a kernel with these inputs."""
        return LoraCall(
            self.x, base, list(self.lora_a), list(self.lora_b), self.gate.reshape(-1, len(self.scale)),
            list(self.scale), self.dropout, self.per_expert, self.seed if self.dropout > 0.0 else None, every_column,
        )  # fmt: skip


def make_inputs(workload: Workload, dtype: torch.dtype = torch.float32, seed: int = 0) -> LoraInputs:
    """Random inputs of a workload, drawn in float64 and rounded to dtype once: the same numbers for every backend."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    experts = len(workload.ranks)
    x = draw(*workload.leading, workload.in_features)
    if not workload.contiguous:
        x = draw(*workload.leading, 2 * workload.in_features).to(dtype)[..., ::2]
    gate_leading = workload.leading if workload.gate == "token" else workload.leading[:1]
    gate = draw(*gate_leading, experts) + 0.5
    if workload.pattern == "top2":
        gate = torch.zeros_like(gate).scatter(-1, gate.topk(2, dim=-1).indices, 1.0)
    elif workload.pattern == "one_expert":
        gate = torch.zeros_like(gate).index_fill(-1, torch.tensor([1]), 1.0)
    elif workload.pattern == "last_unused":
        gate[..., -1] = 0.0
    elif workload.pattern == "zero_and_negative":
        gate[::2] = 0.0
        gate[1::2] = -gate[1::2].abs()
    return LoraInputs(
        x=x.to(dtype),
        lora_a=tuple(
            (draw(rank, workload.in_features) / workload.in_features**0.5).to(dtype) for rank in workload.ranks
        ),
        lora_b=tuple(draw(workload.out_features, rank).to(dtype) for rank in workload.ranks),
        gate=gate.to(dtype),
        # Different for every expert, so that tests detect exchanged scales.
        scale=tuple(2.0 / (1 + e) for e in range(experts)),
        grad=draw(*workload.leading, workload.out_features).to(dtype),
        trainable=tuple(e not in workload.frozen for e in range(experts)),
        dropout=workload.dropout,
        per_expert=workload.per_expert,
        seed=torch.tensor(seed * 2**33 + 2025),
    )


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


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One tensor's errors: accepted when `error <= allowed`; a NaN anywhere is not."""

    name: str
    error: float
    expected: float
    allowed: float

    @property
    def accepted(self) -> bool:
        return self.error <= self.allowed


def worst_row_error(actual: Tensor, truth: Tensor) -> float:
    """The largest root mean square error of a row (the last dimension); 0.0 without rows."""
    if truth.numel() == 0:
        return 0.0
    difference = actual.double().reshape(-1, actual.shape[-1]) - truth.double().reshape(-1, truth.shape[-1])
    return float(difference.square().mean(1).sqrt().max())


def judge(actual: Results, expected: Mapping[str, float], truth: Results, *, factor: float = FACTOR) -> list[Verdict]:
    """One verdict a tensor: at most `factor` times its expected error, the worst row of each.

    Raises ValueError when tensors are missing or have other shapes than the truth's.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in truth.items()}
    got = {name: tuple(tensor.shape) for name, tensor in actual.items()}
    if got != shapes:
        raise ValueError(f"results have shapes {got}; expected {shapes}. Return what the oracle returns.")
    return [
        Verdict(
            name=name,
            error=worst_row_error(actual[name], exact),
            expected=expected[name],
            allowed=factor * expected[name],
        )
        for name, exact in truth.items()
    ]


def expected_errors(inputs: LoraInputs) -> dict[str, float]:
    """The expected error of a correct kernel on these inputs in their dtype, by result."""
    return multi_lora_errors(inputs.call(), inputs.grad, inputs.trainable, inputs.x.dtype)


def few_roundings(dtype: torch.dtype, truth: Tensor, *, roundings: int = 4) -> float:
    """An expected error for results that are exact but for their last roundings: `roundings` units of the largest
    row, for ops that accumulate in a wider type or add few terms."""
    return roundings * torch.finfo(dtype).eps / 2 * worst_row_error(torch.zeros_like(truth), truth)


def run_reference(inputs: LoraInputs) -> Results:
    return run_kernels(reference.multi_lora_forward, reference.multi_lora_backward, inputs)


def judge_run(
    run: Callable[[LoraInputs], Results], workload: Workload, dtype: torch.dtype, *, factor: float = FACTOR,
    draws: int = 4,
) -> list[Verdict]:  # fmt: skip
    """The rule on all outputs of `run` for a workload, several draws together: the worst row of all."""
    actuals: list[Results] = []
    truths: list[Results] = []
    expected: dict[str, float] = {}
    for seed in range(draws):
        inputs = make_inputs(workload, dtype, seed)
        actuals.append(run(inputs))
        truths.append(run_autograd(multi_lora_loop, inputs.to(torch.float64)))
        for name, error in expected_errors(inputs).items():
            expected[name] = max(error, expected.get(name, 0.0))
    actual, truth = (
        {name: torch.stack([r[name] for r in results]) for name in results[0]} for results in (actuals, truths)
    )
    return judge(actual, expected, truth, factor=factor)


def rejected(verdicts: Sequence[Verdict]) -> list[str]:
    """Readable lines of the results that failed; empty when all were accepted."""
    return [
        f"{v.name}: worst-row error {v.error:.3g} above {v.allowed:.3g} (expected {v.expected:.3g})"
        for v in verdicts
        if not v.accepted
    ]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Exposes reads of unwritten memory: in the block every `torch.empty` is full of NaN (or the largest integer), and
    so is the work memory of the compiled kernels."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    if cpu.EXTENSION is not None:
        cpu.EXTENSION.poison_scratch(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        if cpu.EXTENSION is not None:
            cpu.EXTENSION.poison_scratch(False)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """`torch.set_num_threads(count)` for the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def triton_on_cpu() -> Iterator[None]:
    """`backend="triton"` for tensors on the CPU in the block, in every dtype: for Triton's interpreter, which runs the
    kernels there (TRITON_INTERPRET=1 before Triton is imported)."""
    if not triton_backend.available():
        raise ValueError(triton_backend.MISSING)
    before = BACKENDS["triton"], DTYPES["triton"]
    BACKENDS["triton"], DTYPES["triton"] = ("cpu", "cuda"), None
    try:
        yield
    finally:
        BACKENDS["triton"], DTYPES["triton"] = before
