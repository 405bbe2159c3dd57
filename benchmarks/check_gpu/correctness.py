# SPDX-License-Identifier: Apache-2.0
"""
    python -m benchmarks.check_gpu.correctness        a few tiny checks on the GPU, which compute-sanitizer runs

Every op of the GPU backends over the workloads, against float64 by the rule of `dmole_kernels.testing`: worst row at
most twice as wrong as the reference in the same dtype (both on the CPU), on the LoRA delta alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dmole_kernels import (
    BACKENDS,
    accumulate_gradient,
    accumulate_sketch,
    grad_norm_per_sample,
    masked_max_pool,
    multi_lora,
    router_score,
)
from dmole_kernels._fused_linear import fused_linear
from dmole_kernels.testing import (
    WORKLOADS,
    LoraInputs,
    Results,
    Workload,
    dtype_name,
    expected_errors,
    few_roundings,
    judge,
    judge_run,
    make_inputs,
    multi_lora_loop,
    multi_lora_op,
    poisoned_memory,
    product_error,
    rejected,
    run_autograd,
    run_reference,
)

# More columns than one block, several row tiles, gates with whole (row tile, column block) pairs of zeros.
SEVERAL_BLOCKS = Workload(
    name="several_blocks", leading=(5, 32), in_features=136, out_features=40, ranks=(33, 31, 64, 8),
    pattern="one_expert",
)  # fmt: skip
# The decode path of the cuda backend: at most 16 rows, forward alone.
DECODE = (
    Workload(name="decode_one_row", leading=(1,), in_features=64, out_features=48, ranks=(3, 8)),
    Workload(name="decode_16", leading=(16,), in_features=136, out_features=40, ranks=(1, 16, 64, 8), pattern="top2"),
    Workload(name="decode_tokens", leading=(2, 7), in_features=37, out_features=53, ranks=(5, 2), gate="token"),
)  # fmt: skip
TINY = ("zero_rows", "token_gates", "dropout_per_expert", "zero_and_negative")
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
Op = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Check:
    """`complaints()` runs it and returns the errors found, one a line."""

    name: str
    complaints: Callable[[], list[str]]


def checks(device: str, *, tiny: bool = False) -> Iterator[Check]:
    """All of them; `tiny`: a few workloads, two dtypes."""
    singles = [("fused_linear with its base", _fused_with_base), ("torch.compile", _compiled)]
    if device == "cuda":
        singles += [("CUDA graph", _replayed), ("no host synchronisation", _without_waiting)]
    for name, complaints in singles:
        yield Check(name=f"triton {name}", complaints=partial(complaints, device))
    dtypes = DTYPES[:2] if tiny else DTYPES
    workloads = [w for w in (*WORKLOADS, SEVERAL_BLOCKS) if not tiny or w.name in TINY]
    for dtype in dtypes:
        for workload in workloads:
            for name, run in (
                ("multi_lora", _trained),
                ("multi_lora, constant gates", _inference),
                ("fused_linear", _fused),
            ):
                yield _lora_check(f"triton {name}", partial(run, device), workload, dtype, every=not tiny)
        if device in (BACKENDS.get("cuda") or ()):
            for workload in DECODE:
                yield Check(name=f"cuda multi_lora {workload.name} {dtype_name(dtype)}",
                            complaints=partial(_decode, device, workload, dtype))  # fmt: skip
        for name, op, shapes in _other_ops():
            check = partial(_compared, op, shapes, dtype, device)
            yield Check(name=f"triton {name} {dtype_name(dtype)}", complaints=check)


def _lora_check(
    name: str, run: Callable[[LoraInputs], Results], workload: Workload, dtype: torch.dtype, *, every: bool
) -> Check:
    draws = max(4, 16 // max(1, workload.leading[0])) if every or dtype == torch.float32 else 1
    return Check(
        name=f"{name} {workload.name} {dtype_name(dtype)}",
        complaints=lambda: rejected(judge_run(run, workload, dtype, draws=draws)),
    )


def on_device(inputs: LoraInputs, device: str) -> LoraInputs:
    """The same tensors there, strides of x included."""
    x = inputs.x.to(device)
    if not inputs.x.is_contiguous():
        x = x.repeat_interleave(2, -1)[..., ::2]
    return replace(
        inputs,
        x=x,
        lora_a=tuple(a.to(device) for a in inputs.lora_a),
        lora_b=tuple(b.to(device) for b in inputs.lora_b),
        gate=inputs.gate.to(device),
        grad=inputs.grad.to(device),
        seed=inputs.seed.to(device),
    )


def _back(results: Results) -> Results:
    return {name: tensor.cpu() for name, tensor in results.items()}


def _trained(device: str, inputs: LoraInputs) -> Results:
    there = replace(on_device(inputs, device), seed=inputs.seed)  # from the host here, on the device in the others
    with poisoned_memory():
        return _back(run_autograd(partial(multi_lora_op, backend="triton"), there))


def _inference(device: str, inputs: LoraInputs) -> Results:
    """The output without gradients, where column blocks without an active gate are skipped; the rest as `reference`."""
    with poisoned_memory(), torch.no_grad():
        delta = multi_lora_op(on_device(inputs, device), backend="triton")
    return run_reference(inputs) | {"delta": delta.cpu()}


def _fused(device: str, inputs: LoraInputs) -> Results:
    """With W = 0: the LoRA delta alone."""

    def op(there: LoraInputs) -> Tensor:
        weight = there.x.new_zeros(there.lora_b[0].shape[0], there.x.shape[-1])
        # Not around backward: its dY W is a cuBLAS call, which PyTorch calls deterministic only with a setting.
        with poisoned_memory():
            return fused_linear(
                there.x, weight, None, there.lora_a, there.lora_b, there.gate, there.scale, dropout=there.dropout,
                dropout_mode="per_expert" if there.per_expert else "shared", seed=there.seed,
            )  # fmt: skip

    return _back(run_autograd(op, on_device(inputs, device)))


def _decode(device: str, workload: Workload, dtype: torch.dtype) -> list[str]:
    actuals: list[Tensor] = []
    truths: list[Tensor] = []
    expected = 0.0
    for seed in range(8):
        inputs = make_inputs(workload, dtype, seed)
        expected = max(expected, expected_errors(inputs)["delta"])
        with torch.no_grad():
            actuals.append(multi_lora_op(on_device(inputs, device), backend="cuda").cpu())
            truths.append(multi_lora_loop(inputs.to(torch.float64)))
    actual, truth = ({"delta": torch.stack(found)} for found in (actuals, truths))
    return rejected(judge(actual, {"delta": expected}, truth))


def _other_ops() -> list[tuple[str, Op, Sequence[tuple[int, ...]]]]:
    """(name, function of (backend, tensors), shapes of the tensors)."""

    def norm(method: str, backend: str, x: Tensor, grad: Tensor) -> Tensor:
        return grad_norm_per_sample(x, grad, method=method, backend=backend)  # type: ignore[arg-type]

    def gradient(backend: str, x: Tensor, grad: Tensor) -> Tensor:
        buffer = x.new_zeros(grad.shape[1], x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
        accumulate_gradient(buffer, x, grad, backend=backend)
        return buffer

    def sketch(backend: str, x: Tensor, grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        total = x.new_zeros(left.shape[1], right.shape[1], dtype=dtype)
        accumulate_sketch(total, x, grad, left.to(dtype), right.to(dtype), backend=backend)
        return total

    def score(backend: str, *tensors: Tensor) -> Tensor:
        return router_score(*tensors, backend=backend)

    def pool(backend: str, hidden: Tensor) -> Tensor:
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        mask[:, 1::3] = False
        return masked_max_pool(hidden, mask, backend=backend)

    return [
        ("grad_norm direct", partial(norm, "direct"), ((3, 37, 19), (3, 37, 23))),
        ("grad_norm ghost", partial(norm, "ghost"), ((3, 37, 19), (3, 37, 23))),
        ("accumulate_gradient", gradient, ((37, 40), (37, 23))),
        ("accumulate_sketch", sketch, ((37, 40), (37, 23), (23, 40), (40, 17))),
        ("router_score", score, ((19, 37), (3, 21, 37), (3, 21), (3, 37, 21), (3, 37))),
        ("masked_max_pool", pool, ((3, 7, 140),)),
    ]


def _compared(op: Op, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[str]:
    actuals: list[Tensor] = []
    truths: list[Tensor] = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        tensors = [torch.randn(*shape, generator=generator).to(dtype) / 4 for shape in shapes]
        with poisoned_memory():
            actuals.append(op("triton", *(tensor.to(device) for tensor in tensors)).cpu())
        truths.append(op("reference", *(tensor.double() for tensor in tensors)))
    actual, truth = ({"result": torch.stack(found)} for found in (actuals, truths))
    expected = few_roundings(actual["result"].dtype, truth["result"], roundings=8)
    return rejected(judge(actual, {"result": expected}, truth))


def _fused_with_base(device: str) -> list[str]:
    """The base product of the fused launch, which the checks with W = 0 do not cover."""
    actuals: list[Tensor] = []
    truths: list[Tensor] = []
    expected = 0.0
    for seed in range(4):
        inputs = make_inputs(SEVERAL_BLOCKS, torch.bfloat16, seed)
        generator = torch.Generator().manual_seed(seed)
        weight, bias = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((40, 136), (40,)))
        there, exact = on_device(inputs, device), inputs.to(torch.float64)
        with torch.no_grad():
            y = fused_linear(
                there.x, weight.to(device), bias.to(device), there.lora_a, there.lora_b, there.gate, there.scale
            )
            actuals.append(y.cpu())
            truths.append(F.linear(exact.x, weight.double(), bias.double()) + multi_lora_loop(exact))
        own = product_error(inputs.x, weight, torch.bfloat16, bias)
        expected = max(expected, math.hypot(own, expected_errors(inputs)["delta"]))
    actual, truth = ({"y": torch.stack(found)} for found in (actuals, truths))
    return rejected(judge(actual, {"y": expected}, truth))


def _compiled(device: str) -> list[str]:
    """torch.compile(fullgraph=True) gives the eager result, bit for bit."""
    inputs = on_device(make_inputs(SEVERAL_BLOCKS), device)

    def op(x: Tensor) -> Tensor:
        return multi_lora(x, None, inputs.lora_a, inputs.lora_b, inputs.gate, inputs.scale, backend="triton")

    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    same = torch.equal(compiled(inputs.x), op(inputs.x))
    return [] if same else ["the compiled result is not the eager one"]


def _replayed(device: str) -> list[str]:
    """A captured CUDA graph replayed with another x and another seed gives what an eager call gives."""
    workload = replace(SEVERAL_BLOCKS, dropout=0.3)
    first, second = (on_device(make_inputs(workload, torch.bfloat16, seed), device) for seed in range(2))
    with torch.no_grad():
        multi_lora_op(first, backend="triton")  # compiles, and puts the table of addresses on the device
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = multi_lora_op(first, backend="triton")
        first.x.copy_(second.x)
        first.seed.copy_(second.seed)
        graph.replay()
        expected = multi_lora_op(first, backend="triton")
    return [] if torch.equal(y, expected) else ["the replayed result is not the eager one"]


def _without_waiting(device: str) -> list[str]:
    """A second forward and backward do not synchronise with the host; PyTorch raises on an operation that would."""
    inputs = on_device(make_inputs(replace(SEVERAL_BLOCKS, dropout=0.3), torch.bfloat16), device)
    op = partial(multi_lora_op, backend="triton")
    run_autograd(op, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_autograd(op, inputs)
    except RuntimeError as error:
        return [f"the host waited: {error}"]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return []


if __name__ == "__main__":
    found = [f"{check.name}: {line}" for check in checks("cuda", tiny=True) for line in check.complaints()]
    print("\n".join(found))
    sys.exit(1 if found else 0)
