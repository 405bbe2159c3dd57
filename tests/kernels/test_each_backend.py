# SPDX-License-Identifier: Apache-2.0
"""What PyTorch may do with an op, for every op and backend: opcheck, compile, autocast, checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dmole_kernels import (
    BACKENDS,
    accumulate_gradient,
    accumulate_sketch,
    cpu,
    cuda,
    router_select,
)
from dmole_kernels.testing import WORKLOADS, make_inputs

from .op_calls import CALLS, MASK, SCALE, Call, close, draw, tensors_of

# PyTorch's own first use of forward mode compiles decompositions with it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


@pytest.fixture(params=[name for name in BACKENDS if name in ("cpu", "reference")])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


EVERY_CALL = pytest.mark.parametrize("name", CALLS)


def gradients(call: Call, tensors: tuple[Tensor, ...], weight: Tensor | None = None) -> tuple[Tensor, ...]:
    """By plain autograd."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = call(*leaves)
    # Not autograd.grad, which checkpoints of the reentrant kind refuse.
    output.backward(torch.ones_like(output) if weight is None else weight)
    found = tuple(leaf.grad for leaf in leaves)
    assert all(grad is not None for grad in found)
    return found  # type: ignore[return-value]


def registered_calls(backend: str) -> dict[str, tuple[Any, ...]]:
    """Arguments for every registered op."""
    x, base, gate, a0, a1, b0, b1 = (tensor.requires_grad_() for tensor in tensors_of("multi_lora"))
    frozen = (base.detach(), x.detach(), draw(6, 4), [a0.detach(), a1.detach()], [b0.detach(), b1.detach()])
    rows, grad_rows = draw(6, 4), draw(6, 5, seed=1)
    router = tensors_of("router_score")
    return {
        "multi_lora": (x, base, [a0, a1], [b0, b1], gate, SCALE, 0.0, False, None, backend, True),
        "multi_lora_backward": (
            *frozen, gate.detach(), SCALE, 0.3, True, torch.tensor(3), True, True, [True, False], backend,
        ),
        "grad_norm_per_sample": (
            *(tensor.requires_grad_() for tensor in tensors_of("grad_norm_ghost")), "ghost", backend,
        ),
        "accumulate_gradient": (draw(5, 4, seed=2), rows, grad_rows, backend),
        "accumulate_sketch": (draw(3, 2, seed=2), rows, grad_rows, draw(5, 3), draw(4, 2), backend),
        "router_score": (*(tensor.clone().requires_grad_() for tensor in router), True, backend),
        "router_score_backward": (draw(4, 3), *router, True, backend),
        "router_select": (draw(4, 3), draw(3), 2, backend),
        "masked_max_pool": (draw(2, 3, 5).requires_grad_(), MASK, backend),
        # Of the cpu backend alone: elsewhere it is F.linear.
        **({"frozen_linear": (x, draw(5, 6), draw(5))} if cpu.EXTENSION is not None else {}),
    }  # fmt: skip


def registered_ops() -> set[str]:
    schemas = torch._C._jit_get_all_schemas()
    return {schema.name.partition("::")[2] for schema in schemas if schema.name.startswith("dmole_kernels::")}


@pytest.mark.parametrize("name", sorted(registered_calls("reference")))
def test_opcheck(name: str, backend: str) -> None:
    torch.library.opcheck(getattr(torch.ops.dmole_kernels, name).default, registered_calls(backend)[name])


def test_opcheck_has_seen_every_op() -> None:
    assert registered_ops() - set(cpu.OPS) - set(cuda.OPS) == set(registered_calls("reference"))


@pytest.mark.parametrize("name", [w.name for w in WORKLOADS])
def test_opcheck_of_every_workload(name: str, backend: str) -> None:
    inputs = make_inputs(next(workload for workload in WORKLOADS if workload.name == name))
    pairs = tuple(zip(inputs.lora_a, inputs.lora_b, inputs.trainable, strict=True))
    arguments = (
        inputs.x.clone().requires_grad_(), inputs.grad.clone().requires_grad_(),
        [a.clone().requires_grad_(flag) for a, _, flag in pairs],
        [b.clone().requires_grad_(flag) for _, b, flag in pairs],
        inputs.gate.clone().requires_grad_(), list(inputs.scale), inputs.dropout, inputs.per_expert,
        inputs.seed if inputs.dropout else None, backend, True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.dmole_kernels.multi_lora.default, arguments)


@pytest.mark.skipif(cpu.EXTENSION is None, reason=f"no compiled extension: {cpu.MISSING}")
def test_schemas_of_the_compiled_ops_are_true() -> None:
    """What they say about writing into their arguments; fakes and derivatives belong to the ops above them."""
    calls = registered_calls("cpu")
    *lora_arguments, _, every_column = calls["multi_lora"]
    compiled = {
        "cpu_gemm": (draw(3, 4), draw(4, 5)),
        "cpu_multi_lora": (*lora_arguments, every_column, None),
        "cpu_multi_lora_backward": (*calls["multi_lora_backward"][:-1], None),
        "cpu_squared_norm": calls["grad_norm_per_sample"][:-1],
        **{f"cpu_{name}": calls[name][:-1] for name in calls if f"cpu_{name}" in cpu.OPS and "lora" not in name},
        # Its call names no backend.
        "cpu_frozen_linear": calls["frozen_linear"],
    }
    assert set(compiled) == set(cpu.OPS)
    for name, arguments in compiled.items():
        op = getattr(torch.ops.dmole_kernels, name).default
        with torch.no_grad():
            torch.library.opcheck(op, arguments, test_utils="test_schema")


@EVERY_CALL
def test_compile_without_graph_breaks_gives_the_same_bits(name: str, backend: str) -> None:
    call, tensors = CALLS[name](backend), tensors_of(name)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), call(*tensors))
    assert all(map(torch.equal, gradients(compiled, tensors), gradients(call, tensors)))


def test_compile_of_selection_and_sums(backend: str) -> None:
    x, grad, left, right = draw(6, 4), draw(6, 5, seed=1), draw(5, 3, seed=2), draw(4, 2, seed=3)
    error, threshold = draw(4, 3).abs(), draw(3, seed=1).abs()

    def run(gradient: Tensor, sketch: Tensor) -> Tensor:
        accumulate_gradient(gradient, x, grad, backend=backend)
        accumulate_sketch(sketch, x, grad, left, right, backend=backend)
        return router_select(error, threshold, backend=backend)

    eager = [torch.ones(5, 4), torch.ones(3, 2)]
    traced = [tensor.clone() for tensor in eager]
    gate = run(*eager)
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(*traced), gate)
    assert all(map(torch.equal, eager, traced))


@EVERY_CALL
def test_autocast_changes_nothing_inside_an_op(name: str, backend: str) -> None:
    """Dtypes are settled by the arguments: autocast is for what is around the ops."""
    call, tensors = CALLS[name](backend), tensors_of(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, grads = call(*tensors), gradients(call, tensors)
    assert torch.equal(inside, call(*tensors))
    if not name.startswith("grad_norm"):
        assert all(map(torch.equal, grads, gradients(call, tensors)))


@EVERY_CALL
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved_tensor_hooks", "reentrant"])
def test_checkpoint(name: str, reentrant: bool, backend: str) -> None:
    call, tensors = CALLS[name](backend), tensors_of(name)
    again = gradients(lambda *t: checkpoint(call, *t, use_reentrant=reentrant), tensors)
    assert all(map(torch.equal, again, gradients(call, tensors)))


@EVERY_CALL
def test_strides_do_not_matter(name: str, backend: str) -> None:
    call, tensors = CALLS[name](backend), tensors_of(name)
    transposed = tuple(t.transpose(0, -1).contiguous().transpose(0, -1) for t in tensors)
    spread = tuple(torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0] for t in tensors)
    for other in (transposed, spread):
        close(call(*other), call(*tensors))
        close(gradients(call, other), gradients(call, tensors))


@pytest.mark.parametrize("name", [name for name in CALLS if name != "masked_max_pool"])
def test_no_rows(name: str, backend: str) -> None:
    call, (first, second, *rest) = CALLS[name](backend), tensors_of(name)
    tensors = (first[:0], second if "router" in name else second[:0], *rest)
    if "lora" in name:
        tensors = (*tensors[:2], rest[0][:0], *rest[1:])
    assert call(*tensors).shape[0] == 0
    assert all(not gradient.any() for gradient in gradients(call, tensors))


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 1, 3), (2, 2, 1, 2)], ids=str)
def test_any_number_of_leading_dimensions(leading: tuple[int, ...], backend: str) -> None:
    call, (_, _, _, *experts) = CALLS["multi_lora"](backend), tensors_of("multi_lora")
    x, base = draw(*leading, 6), draw(*leading, 5, seed=1)
    for known in range(len(leading) + 1):
        gate = draw(*leading[:known], 2, seed=2)
        rows = gate.reshape(-1, 2).repeat_interleave(x[..., 0].numel() // gate[..., 0].numel(), 0)
        tensors = (x.reshape(-1, 6), base.reshape(-1, 5), rows, *experts)
        actual, expected = call(x, base, gate, *experts), call(*tensors)
        close(actual.reshape(expected.shape), expected)
        flat, one_by_one = gradients(call, (x, base, gate, *experts)), gradients(call, tensors)
        close(flat[2].reshape(-1, 2).sum(0), one_by_one[2].sum(0))
        close(flat[3:], one_by_one[3:])
