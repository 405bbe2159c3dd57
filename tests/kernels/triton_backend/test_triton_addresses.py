# SPDX-License-Identifier: Apache-2.0
"""The bytes that a `Launch` states are those its programs touch: distinct addresses, counted in the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import TensorHandle, interpreter_builder

from dmole_kernels._lora_call import LoraCall, Wanted
from dmole_kernels.testing import Workload, make_inputs
from dmole_kernels.triton_backend.fused_base import fused_base_forward
from dmole_kernels.triton_backend.grad_norm import (
    accumulate_gradient,
    accumulate_sketch,
    squared_norm_direct,
    squared_norm_ghost,
)
from dmole_kernels.triton_backend.launch import Launch
from dmole_kernels.triton_backend.multi_lora import multi_lora_backward, multi_lora_forward
from dmole_kernels.triton_backend.router_score import masked_max_pool, router_score_forward

# What a launch calls its operands -> the kernel's parameters that hold them; "A" and "B" lie behind the table.
OPERANDS = {
    "S": ("shrunk",),
    "W": ("weight",),
    "dY": ("grad",),
    "G": ("grad",),
    "dS": ("dshrunk",),
    "P * S": ("products",),
    "L": ("left",),
    "R": ("right",),
    "norm": ("out",),
    "sketch": ("out",),
    "dA": ("partial_a",),
    "dB": ("partial_b",),
    "dA, dB": ("da", "db"),
    "dg": ("dgate",),
    "partial": ("partial", "partial_a", "partial_b"),
    "weights": ("encoder_weight", "encoder_bias", "decoder_weight", "decoder_bias"),
    "metadata": ("table", "blocks", "gate", "flags", "trainable_blocks", "experts", "key_low"),
}


class Touched:
    """Element addresses that the interpreter loads and stores, while `recording`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loads: dict[int, int] = {}
        self.stores: dict[int, int] = {}
        load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

        def note(into: dict[int, int], pointers: TensorHandle, mask: TensorHandle) -> None:
            size = pointers.get_element_ty().primitive_bitwidth // 8
            for address in np.unique(pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]):
                into[int(address)] = size

        def noted_load(pointers: TensorHandle, mask: TensorHandle, *rest: Any) -> TensorHandle:
            note(self.loads, pointers, mask)
            return load(pointers, mask, *rest)

        def noted_store(pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> None:
            note(self.stores, pointers, mask)
            store(pointers, value, mask, *rest)

        monkeypatch.setattr(interpreter_builder, "create_masked_load", noted_load)
        monkeypatch.setattr(interpreter_builder, "create_masked_store", noted_store)

    def take(self) -> tuple[dict[int, int], dict[int, int]]:
        taken = self.loads, self.stores
        self.loads, self.stores = {}, {}
        return taken


def bytes_of(touched: dict[int, int], tensors: Iterable[Tensor]) -> int:
    """Takes the addresses inside these tensors out of `touched`; how many bytes they are."""
    total = 0
    for tensor in tensors:
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
        inside = [address for address in touched if start <= address < stop]
        total += sum(touched.pop(address) for address in inside)
    return total


class Ledger:
    """A runner that runs each launch and compares what it states with what it touches.

    Equal for every operand, but for the plan: a kernel reads the rows of the table that it needs, at most all of it.
    """

    def __init__(self, touched: Touched, lora_a: Sequence[Tensor] = (), lora_b: Sequence[Tensor] = ()) -> None:
        self.touched = touched
        self.experts = {"A": lora_a, "B": lora_b}
        self.names: list[str] = []

    def __call__(self, launch: Launch) -> None:
        self.touched.take()
        launch.run()
        for kind, touched, stated in zip(
            ("reads", "writes"), self.touched.take(), (launch.reads, launch.writes), strict=True
        ):
            for operand, expected in stated.items():
                parameters = OPERANDS.get(operand, (operand,))
                tensors = self.experts.get(operand) or [
                    tensor for name in parameters if isinstance(tensor := launch.arguments.get(name), Tensor)
                ]
                count = bytes_of(touched, tensors) if expected else 0
                if operand == "metadata":
                    assert count <= expected, (launch.name, kind, operand)
                else:
                    assert count == expected, (launch.name, kind, operand)
            assert not touched, f"{launch.name} {kind} what it does not state"
        self.names.append(launch.name)


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> Touched:
    return Touched(monkeypatch)


LAYERS = (
    Workload(name="primes", leading=(3, 13), in_features=37, out_features=53, ranks=(1, 5, 17)),
    Workload(name="two_blocks", leading=(2, 35), in_features=40, out_features=24, ranks=(33, 40), dropout=0.1),
    Workload(name="token_gates", leading=(3, 7), in_features=31, out_features=17, ranks=(3, 8), gate="token"),
    Workload(name="masks", leading=(2, 9), in_features=30, out_features=20, ranks=(4, 3), dropout=0.3, per_expert=True),
    Workload(name="splits", leading=(2, 150), in_features=40, out_features=24, ranks=(2, 1)),
)


@pytest.mark.parametrize("workload", LAYERS, ids=lambda workload: workload.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_layer_touches_the_bytes_its_launches_state(workload: Workload, dtype: torch.dtype, touched: Touched) -> None:
    inputs = make_inputs(workload, dtype)
    gate = inputs.gate.reshape(-1, len(inputs.scale))
    seed = inputs.seed if workload.dropout else None
    ledger = Ledger(touched, inputs.lora_a, inputs.lora_b)

    arguments = (inputs.lora_a, inputs.lora_b, gate, inputs.scale, inputs.dropout, inputs.per_expert, seed)
    base = torch.randn(*workload.leading, workload.out_features).to(dtype)
    _, shrunk = multi_lora_forward(LoraCall(inputs.x, base, *arguments), runner=ledger)
    multi_lora_backward(
        LoraCall(inputs.x, None, *arguments),
        inputs.grad,
        shrunk,
        Wanted(True, True, [True] * len(inputs.scale)),
        runner=ledger,
    )
    weight = torch.randn(workload.out_features, workload.in_features).to(dtype)
    fused_base_forward(LoraCall(inputs.x, None, *arguments), weight, weight[:, 0].contiguous(), runner=ledger)
    assert ledger.names == [
        "shrink", "expand", "shrink_gradient", "weight_gradient", "finish", "input_gradient", "shrink", "fused_base",
    ]  # fmt: skip


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(*shape, generator=torch.Generator().manual_seed(0)) / 8 for shape in shapes]


def pooled(runner: Callable[[Launch], None]) -> None:
    masked_max_pool(*drawn((3, 7, 140)), torch.ones(3, 7, dtype=torch.bool), runner=runner)


OTHERS: dict[str, Callable[[Callable[[Launch], None]], object]] = {
    "norm_direct": lambda runner: squared_norm_direct(*drawn((3, 37, 19), (3, 37, 23)), runner=runner),
    "norm_ghost": lambda runner: squared_norm_ghost(*drawn((3, 37, 19), (3, 37, 23)), runner=runner),
    "accumulate": lambda runner: accumulate_gradient(*drawn((23, 40), (37, 40), (37, 23)), runner=runner),
    "sketch_tile": lambda runner: accumulate_sketch(
        *drawn((40, 17), (37, 40), (37, 23), (23, 40), (40, 17)), runner=runner
    ),
    "router_score": lambda runner: router_score_forward(
        *drawn((19, 37), (3, 21, 37), (3, 21), (3, 37, 21), (3, 37)), True, runner=runner
    ),
    "masked_max_pool": pooled,
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_ops_touch_the_bytes_their_launches_state(name: str, touched: Touched) -> None:
    ledger = Ledger(touched)
    OTHERS[name](ledger)
    assert ledger.names[0] == name


def test_blocks_without_a_gate_touch_less_than_is_stated(touched: Touched) -> None:
    inputs = make_inputs(LAYERS[1])
    gate = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    loads: dict[str, int] = {}

    def count(launch: Launch) -> None:
        touched.take()
        launch.run()
        loads[launch.name] = sum(touched.take()[0].values())
        assert loads[launch.name] < sum(launch.reads.values())

    arguments = (inputs.lora_a, inputs.lora_b, gate, inputs.scale, 0.0, False, None)
    multi_lora_forward(LoraCall(inputs.x, None, *arguments, every_column=False), runner=count)
    assert list(loads) == ["shrink", "expand"]


def test_a_wrong_statement_is_noticed(touched: Touched) -> None:
    def misstated(launch: Launch) -> None:
        less = {name: size - 4 for name, size in launch.reads.items()}
        Ledger(touched)(Launch(**(vars(launch) | {"reads": less})))

    with pytest.raises(AssertionError, match="norm_direct"):
        squared_norm_direct(*drawn((3, 37, 19), (3, 37, 23)), runner=misstated)
