# SPDX-License-Identifier: Apache-2.0
"""The multi-LoRA op against its oracle, and the oracle against paper and pencil."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dmole_kernels import multi_lora
from dmole_kernels.testing import (
    WORKLOADS,
    LoraInputs,
    Workload,
    judge_run,
    make_inputs,
    multi_lora_loop,
    multi_lora_op,
    poisoned_memory,
    rejected,
    run_autograd,
    run_reference,
)

BY_NAME = {workload.name: workload for workload in WORKLOADS}
EVERY_WORKLOAD = pytest.mark.parametrize("workload", WORKLOADS, ids=list(BY_NAME))


def run_op(inputs: LoraInputs) -> dict[str, Tensor]:
    return run_autograd(multi_lora_op, inputs)


def test_oracle_by_hand() -> None:
    """x = [1, 2]; A0 = [[3, 4]], B0 = [[1], [2]], g s = 1 * 2; A1 = [[1, 1]], B1 = [[0], [1]], g s = -1 * 1.

    S = [11, 3]; delta = 2 * 11 * [1, 2] - 3 * [0, 1] = [22, 41]. With dY = [1, 1]: P = [3, 1], dS = [6, -1],
    dx = 6 [3, 4] - [1, 1] = [17, 23], dA0 = 6 x, dB0 = 22 dY, dA1 = -x, dB1 = -3 dY, dg = [2 * 33, 3].
    """
    inputs = LoraInputs(
        x=torch.tensor([[1.0, 2.0]]),
        lora_a=(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 1.0]])),
        lora_b=(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.0]])),
        gate=torch.tensor([[1.0, -1.0]]),
        scale=(2.0, 1.0),
        grad=torch.tensor([[1.0, 1.0]]),
        trainable=(True, True),
    )
    expected = {
        "delta": [[22.0, 41.0]],
        "dx": [[17.0, 23.0]],
        "dgate": [[66.0, 3.0]],
        "da_0": [[6.0, 12.0]],
        "db_0": [[22.0], [22.0]],
        "da_1": [[-1.0, -2.0]],
        "db_1": [[-3.0], [-3.0]],
    }
    for results in (run_autograd(multi_lora_loop, inputs), run_op(inputs), run_reference(inputs)):
        assert {name: tensor.tolist() for name, tensor in results.items()} == expected


@pytest.mark.parametrize("per_expert", [False, True], ids=["shared", "per_expert"])
@pytest.mark.parametrize("function", [multi_lora_loop, multi_lora_op], ids=["oracle", "op"])
def test_gradcheck_of_x_a_b_and_gate_with_dropout(function: object, per_expert: bool) -> None:
    shape = Workload(
        name="", leading=(2, 3), in_features=5, out_features=4, ranks=(1, 3), dropout=0.4, per_expert=per_expert
    )
    inputs = make_inputs(shape, torch.float64)

    def delta(x: Tensor, gate: Tensor, *experts: Tensor) -> Tensor:
        changed = LoraInputs(
            x=x, gate=gate, lora_a=experts[:2], lora_b=experts[2:], scale=inputs.scale, grad=inputs.grad,
            trainable=inputs.trainable, dropout=inputs.dropout, per_expert=per_expert, seed=inputs.seed,
        )  # fmt: skip
        return function(changed)  # type: ignore[operator]

    tensors = [t.detach().requires_grad_() for t in (inputs.x, inputs.gate, *inputs.lora_a, *inputs.lora_b)]
    assert torch.autograd.gradcheck(delta, tensors)


@EVERY_WORKLOAD
def test_float64_equals_the_oracle(workload: Workload) -> None:
    inputs = make_inputs(workload, torch.float64)
    with poisoned_memory():
        actual = run_op(inputs)
    torch.testing.assert_close(actual, run_autograd(multi_lora_loop, inputs), rtol=1e-11, atol=1e-11)


@EVERY_WORKLOAD
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_error_rule(workload: Workload, dtype: torch.dtype) -> None:
    with poisoned_memory():
        assert not rejected(judge_run(run_op, workload, dtype))


@EVERY_WORKLOAD
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_oracle_in_a_working_dtype_rounds_as_expected(workload: Workload, dtype: torch.dtype) -> None:
    """Factor 4, not 2: autograd keeps every intermediate in the working dtype, sums over samples included."""
    verdicts = judge_run(lambda inputs: run_autograd(multi_lora_loop, inputs), workload, dtype, factor=4.0)
    assert not rejected(verdicts)


@given(
    leading=st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple),
    in_features=st.integers(1, 140),
    out_features=st.integers(1, 20),
    ranks=st.lists(st.sampled_from((1, 2, 3, 8, 31)), min_size=1, max_size=4).map(tuple),
    gate=st.sampled_from(("sample", "token")),
    frozen=st.sets(st.integers(0, 3)).map(tuple),
    dropout=st.sampled_from((0.0, 0.05, 0.9)),
    per_expert=st.booleans(),
    contiguous=st.booleans(),
)
def test_any_shape_equals_the_oracle(**drawn: object) -> None:
    inputs = make_inputs(Workload(name="drawn", **drawn), torch.float64)  # type: ignore[arg-type]
    torch.testing.assert_close(run_op(inputs), run_autograd(multi_lora_loop, inputs), rtol=1e-10, atol=1e-10)


def test_base_is_added_and_its_gradient_passes_through() -> None:
    inputs = make_inputs(BY_NAME["old_and_new"], torch.float64)
    base = torch.randn(8, 11, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = multi_lora(inputs.x, base, inputs.lora_a, inputs.lora_b, inputs.gate, inputs.scale)
    delta = multi_lora(inputs.x, None, inputs.lora_a, inputs.lora_b, inputs.gate, inputs.scale)
    torch.testing.assert_close(y, base + delta, rtol=1e-12, atol=1e-12)
    y.backward(inputs.grad)
    assert torch.equal(base.grad, inputs.grad)


def test_experts_in_float32_beside_a_bfloat16_model() -> None:
    inputs = make_inputs(BY_NAME["old_and_new"], torch.float32)
    a, b = (inputs.lora_a[1].clone().requires_grad_(), inputs.lora_b[1].clone().requires_grad_())
    x = inputs.x.bfloat16().requires_grad_()
    base = inputs.grad.bfloat16()
    y = multi_lora(x, base, [inputs.lora_a[0], a], [inputs.lora_b[0], b], inputs.gate, inputs.scale)
    y.float().square().sum().backward()
    assert (y.dtype, x.grad.dtype, a.grad.dtype, b.grad.dtype) == (torch.bfloat16,) * 2 + (torch.float32,) * 2


def test_eager_call_and_registered_op_give_the_same_bits() -> None:
    inputs = make_inputs(BY_NAME["dropout_per_expert"])

    def run_registered(inputs: LoraInputs) -> Tensor:
        y, _ = torch.ops.dmole_kernels.multi_lora(
            inputs.x, None, list(inputs.lora_a), list(inputs.lora_b), inputs.gate, list(inputs.scale), inputs.dropout,
            inputs.per_expert, inputs.seed, "reference", True,
        )  # fmt: skip
        return y

    eager = run_autograd(lambda i: multi_lora_op(i, backend="reference"), inputs)
    registered = run_autograd(run_registered, inputs)
    assert all(torch.equal(eager[name], registered[name]) for name in registered)


def test_dispatch_modes_see_the_op() -> None:
    x, a, b = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(6, 5)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(t) for t in (x, a, b, torch.ones(2, 1))]
        y = multi_lora(fake[0], None, [fake[1]], [fake[2]], fake[3], [1.0], dropout=0.5, seed=torch.tensor(1))
    assert y.shape == (2, 3, 6)


def test_a_second_derivative_is_refused() -> None:
    x = torch.ones(1, 4, requires_grad=True)
    y = multi_lora(x, None, [torch.ones(2, 4)], [torch.ones(3, 2)], torch.ones(1, 1), [1.0])
    (dx,) = torch.autograd.grad(y.sum() * x.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_two_runs_are_bit_equal() -> None:
    inputs = make_inputs(BY_NAME["dropout_shared"])
    first, second = run_op(inputs), run_op(inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_backward_twice_gives_the_same_and_leaves_its_inputs_alone() -> None:
    inputs = make_inputs(BY_NAME["dropout_per_expert"])
    x = inputs.x.clone().requires_grad_()
    a, b = (tuple(t.clone().requires_grad_() for t in ts) for ts in (inputs.lora_a, inputs.lora_b))
    gate = inputs.gate.clone().requires_grad_()
    before = [t.detach().clone() for t in (x, gate, *a, *b)]
    y = multi_lora(
        x, None, a, b, gate, inputs.scale, dropout=0.3, dropout_mode="per_expert", seed=inputs.seed
    )  # fmt: skip
    leaves = (x, gate, *a, *b)
    first = torch.autograd.grad(y, leaves, inputs.grad, retain_graph=True)
    second = torch.autograd.grad(y, leaves, inputs.grad)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert all(torch.equal(t.detach(), old) for t, old in zip(leaves, before, strict=True))


def test_the_seed_comes_from_the_default_generator_whose_state_repeats_it() -> None:
    inputs = make_inputs(BY_NAME["old_and_new"])
    arguments = (inputs.x, None, inputs.lora_a, inputs.lora_b, inputs.gate, inputs.scale)
    state = torch.get_rng_state()
    first = multi_lora(*arguments, dropout=0.5)
    other = multi_lora(*arguments, dropout=0.5)
    torch.set_rng_state(state)
    again = multi_lora(*arguments, dropout=0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_dropout_keeps_the_expectation() -> None:
    x = torch.ones(2000, 64, dtype=torch.float64)
    a, b = torch.ones(1, 64, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    gate = torch.ones(2000, 1, dtype=torch.float64)
    y = multi_lora(x, None, [a], [b], gate, [1.0], dropout=0.25, seed=torch.tensor(7))
    assert y.mean() == pytest.approx(64.0, abs=5 * math.sqrt(64 * 0.25 / 0.75 / 2000))


class AllocatedShapes(TorchDispatchMode):
    """Notes the shape of every tensor an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.shapes.add(tuple(tensor.shape))
        return result


def saved_shapes(inputs: LoraInputs) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    experts = tuple(zip(inputs.lora_a, inputs.lora_b, inputs.trainable, strict=True))
    a = [t.clone().requires_grad_(flag) for t, _, flag in experts]
    b = [t.clone().requires_grad_(flag) for _, t, flag in experts]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        multi_lora(
            inputs.x.clone().requires_grad_(), None, a, b, inputs.gate, inputs.scale, dropout=inputs.dropout
        )  # fmt: skip
    return shapes


def test_saved_for_backward_are_x_and_s_and_no_mask() -> None:
    shapes = saved_shapes(make_inputs(BY_NAME["old_and_new"]))
    assert shapes.count((8, 11, 48)) == 1
    assert shapes.count((88, 16)) == 1
    assert not [shape for shape in shapes if math.prod(shape) >= 88 * 48 and shape != (8, 11, 48)]


def test_frozen_experts_save_no_activation() -> None:
    shapes = saved_shapes(make_inputs(BY_NAME["all_frozen"]))
    assert not [shape for shape in shapes if math.prod(shape) >= 24 * 12]


def test_frozen_experts_get_no_gradient_buffer_and_unasked_dx_is_not_computed() -> None:
    inputs = make_inputs(Workload(name="", leading=(4, 6), in_features=29, out_features=17, ranks=(5, 3), frozen=(0,)))
    a = [inputs.lora_a[0], inputs.lora_a[1].clone().requires_grad_()]
    b = [inputs.lora_b[0], inputs.lora_b[1].clone().requires_grad_()]
    y = multi_lora(inputs.x, None, a, b, inputs.gate, inputs.scale)
    with AllocatedShapes() as seen:
        y.backward(inputs.grad)
    assert (3, 29) in seen.shapes
    assert (3, 17) in seen.shapes
    assert not seen.shapes & {(5, 29), (8, 29), (24, 29), (4, 6, 29)}
    assert a[0].grad is None


def test_errors_tell_what_to_do() -> None:
    x, a, b, gate = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(6, 5), torch.ones(2, 1)
    with pytest.raises(ValueError, match="lora_a is empty; expected at least one expert. Without experts use the base"):
        multi_lora(x, None, [], [], gate, [])
    with pytest.raises(ValueError, match="lora_a has 1 experts, lora_b 1, scale 2, gate 1; expected the same number"):
        multi_lora(x, None, [a], [b], gate, [1.0, 2.0])
    with pytest.raises(ValueError, match=r"expert 0 has lora_a \(5, 4\) and lora_b \(6, 4\); expected \[rank, 4\]"):
        multi_lora(x, None, [a], [torch.zeros(6, 4)], gate, [1.0])
    with pytest.raises(ValueError, match=r"base has shape \(2, 3, 7\); expected \(2, 3, 6\). Pass the layer's output"):
        multi_lora(x, torch.zeros(2, 3, 7), [a], [b], gate, [1.0])
    with pytest.raises(
        ValueError, match=r"gate has shape \(3, 1\) and x \(2, 3, 4\); expected gate's leading dimensions"
    ):
        multi_lora(x, None, [a], [b], torch.ones(3, 1), [1.0])
    with pytest.raises(ValueError, match=r"dropout is 1.0; expected a chance in \[0, 1\)"):
        multi_lora(x, None, [a], [b], gate, [1.0], dropout=1.0)
    with pytest.raises(
        ValueError, match="backend='tpu' is not in this build of dmole_kernels; expected 'auto' or one of"
    ):
        multi_lora(x, None, [a], [b], gate, [1.0], backend="tpu")
    with pytest.raises(
        ValueError, match=r"x has shape \(\) and gate \(2, 1\); expected \[..., features\] and \[..., exp"
    ):
        multi_lora(torch.tensor(1.0), None, [a], [b], gate, [1.0])
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 4\) and gate \(\); expected \[..., features\]"):
        multi_lora(x, None, [a], [b], torch.tensor(1.0), [1.0])
    with pytest.raises(ValueError, match=r"expert 0 has lora_a \(5, 4\) and lora_b \(\); expected"):
        multi_lora(x, None, [a], [torch.tensor(1.0)], gate, [1.0])
    with pytest.raises(ValueError, match=r"gate has shape \(2, 3, 4, 1\) and x \(2, 3, 4\); expected gate's leading"):
        multi_lora(x, None, [a], [b], torch.ones(2, 3, 4, 1), [1.0])
    with pytest.raises(ValueError, match="x is int64; expected a floating-point dtype. Cast it, e.g. with .float"):
        multi_lora(x.long(), None, [a], [b], gate, [1.0])
    meta = {"device": "meta"}
    for name, arguments in (
        ("gate", (x, None, [a], [b], gate.to(**meta))),
        ("base", (x, torch.zeros(2, 3, 6, **meta), [a], [b], gate)),
        (r"lora_a\[1\]", (x, None, [a, a.to(**meta)], [b, b], gate.expand(2, 2))),
        (r"lora_b\[0\]", (x, None, [a], [b.to(**meta)], gate)),
    ):
        with pytest.raises(ValueError, match=f"{name} is on meta and x on cpu; expected one device. Move one of them"):
            multi_lora(*arguments, [1.0] * len(arguments[2]))  # type: ignore[arg-type]
    for dropout in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"dropout is {dropout}; expected a chance in \[0, 1\)"):
            multi_lora(x, None, [a], [b], gate, [1.0], dropout=dropout)
    with pytest.raises(ValueError, match="dropout_mode is 'each'; expected 'shared' or 'per_expert'"):
        multi_lora(x, None, [a], [b], gate, [1.0], dropout_mode="each")  # type: ignore[arg-type]
    for seed in (3, torch.tensor(1.5), torch.tensor([1, 2])):
        with pytest.raises(
            ValueError, match=r"seed is .*; expected an integer tensor of one element. Use torch.tensor"
        ):
            multi_lora(x, None, [a], [b], gate, [1.0], dropout=0.5, seed=seed)  # type: ignore[arg-type]
    arguments = (x, None, [a], [b], gate.clone().requires_grad_(), [1.0], 0.0, False, None, "reference", False)
    with pytest.raises(ValueError, match="the gate requires grad and every_column is False; expected True, because a"):
        torch.ops.dmole_kernels.multi_lora(*arguments)
