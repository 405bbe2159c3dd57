# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of multi_lora, interpreted, over the list of shapes that every backend is judged by."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import TensorHandle, interpreter_builder

from benchmarks.check_gpu.correctness import SEVERAL_BLOCKS
from dmole_kernels._lora_call import LoraCall, Wanted
from dmole_kernels._philox import dropout_keep_mask
from dmole_kernels.testing import (
    WORKLOADS,
    LoraInputs,
    Results,
    Workload,
    expected_errors,
    few_roundings,
    judge,
    judge_run,
    make_inputs,
    multi_lora_loop,
    poisoned_memory,
    rejected,
    run_autograd,
    run_kernels,
)
from dmole_kernels.triton_backend.columns import column_blocks
from dmole_kernels.triton_backend.configs import TABLE, Config, configuration, misfits, target_of_capability
from dmole_kernels.triton_backend.launch import Launch
from dmole_kernels.triton_backend.multi_lora import multi_lora_backward, multi_lora_forward
from dmole_kernels.triton_backend.shrink import shrink

BY_NAME = {workload.name: workload for workload in WORKLOADS}
# So many rows for so few columns that the sums over rows are split.
SEVERAL_SPLITS = Workload(name="several_splits", leading=(2, 150), in_features=40, out_features=24, ranks=(2, 1))


def run_triton(inputs: LoraInputs) -> Results:
    with poisoned_memory():
        return run_kernels(multi_lora_forward, multi_lora_backward, inputs)


@pytest.mark.parametrize("workload", (*WORKLOADS, SEVERAL_BLOCKS, SEVERAL_SPLITS), ids=lambda workload: workload.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_rule(workload: Workload, dtype: torch.dtype) -> None:
    # Many draws where the luck of a few numbers decides; one where the working dtype is coarse, to save time.
    draws = max(4, 16 // max(1, workload.leading[0])) if dtype == torch.float32 else 1
    assert not rejected(judge_run(run_triton, workload, dtype, draws=draws))


@pytest.mark.parametrize("name", ["primes", "dropout_per_expert", "token_gates"])
def test_float64_equals_the_oracle(name: str) -> None:
    inputs = make_inputs(BY_NAME[name], torch.float64)
    torch.testing.assert_close(
        run_triton(inputs), run_autograd(multi_lora_loop, inputs), rtol=1e-11, atol=1e-11
    )  # fmt: skip


def test_base_is_added_and_experts_may_be_wider_than_the_model() -> None:
    inputs = make_inputs(BY_NAME["old_and_new"])
    base = torch.randn(8, 11, 48, generator=torch.Generator().manual_seed(1)).bfloat16()
    experts = (inputs.lora_a, inputs.lora_b, inputs.gate, inputs.scale, 0.0, False, None)
    y, shrunk = multi_lora_forward(LoraCall(inputs.x.bfloat16(), base, *experts))
    wide = replace(inputs, dropout=0.0, x=inputs.x.bfloat16()).to(torch.float64)
    truth = base.double() + multi_lora_loop(wide)
    expected = expected_errors(replace(inputs, dropout=0.0).to(torch.bfloat16))["delta"]
    # The sum with the base is rounded once more, as a number of the base's size.
    expected = math.hypot(expected, few_roundings(torch.bfloat16, truth, roundings=1))
    verdicts = judge({"y": y}, {"y": expected}, {"y": truth})
    assert (y.dtype, shrunk.dtype) == (torch.bfloat16, torch.bfloat16)
    assert not rejected(verdicts)


def test_gates_said_to_be_constant_give_the_same_output_and_skip_the_rest() -> None:
    inputs = make_inputs(SEVERAL_BLOCKS)
    experts = (inputs.lora_a, inputs.lora_b, inputs.gate, inputs.scale, 0.0, False, None)
    y, shrunk = multi_lora_forward(LoraCall(inputs.x, None, *experts))
    with poisoned_memory():
        y_skipped, shrunk_skipped = multi_lora_forward(LoraCall(inputs.x, None, *experts, every_column=False))
    assert torch.equal(y, y_skipped)
    # Expert 1, the only one in use, has columns 33 to 63, in block 0; the other two blocks are not computed.
    assert torch.equal(shrunk[:, :64], shrunk_skipped[:, :64])
    assert not shrunk_skipped[:, 64:].any()


def test_a_sample_does_not_see_its_batch_mates(monkeypatch: pytest.MonkeyPatch) -> None:
    """y, dx and dg of sample 2 alone are those it has at another place of a batch, bit for bit.

    The interpreter's dot is NumPy's, whose rounding depends on the row's place in the tile; a tensor core's does not.
    """

    def dot(a: TensorHandle, b: TensorHandle, d: TensorHandle, *_: object) -> TensorHandle:
        total = d.data.copy()
        for k in range(a.data.shape[1]):
            total += a.data[:, k : k + 1] * b.data[k]
        return TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter_builder, "create_dot", dot)
    inputs = make_inputs(Workload(name="", leading=(3, 21), in_features=40, out_features=24, ranks=(5, 40, 30)))
    whole = run_triton(inputs)
    alone = run_triton(replace(inputs, x=inputs.x[2:], gate=inputs.gate[2:], grad=inputs.grad[2:]))
    for name in ("delta", "dx", "dgate"):
        assert torch.equal(whole[name][2:], alone[name])


def test_rows_beyond_32_bits_are_reached() -> None:
    """A row step of 2^30 elements: row 5 lies past the 32nd bit. The memory between is never touched."""
    step = 2**30
    x = torch.zeros(1).expand(1)
    storage = torch.empty(5 * step + 16, dtype=torch.float16)
    x = torch.as_strided(storage, (6, 16), (step, 1))
    x.copy_(torch.arange(96).view(6, 16) / 96)
    a, b, gate = torch.eye(16).half(), torch.eye(16).half(), torch.ones(1, 1).half()
    y, _ = multi_lora_forward(LoraCall(x, None, [a], [b], gate, [1.0], 0.0, False, None))
    assert torch.equal(y, x.contiguous())


def test_the_mask_is_the_reference_s() -> None:
    """x of ones through an A of unit rows shows the mask itself, columns past the first group and rows too."""
    features, rows = 200, 33
    a = torch.eye(features)[[0, 15, 16, 31, 32, 127, 128, 144, 199]]
    experts = ([a], [torch.ones(1, a.shape[0])], torch.ones(1, 1), [1.0])
    seed = torch.tensor(3 * 2**40 + 17)
    _, shrunk = multi_lora_forward(LoraCall(torch.ones(rows, features), None, *experts, 0.5, False, seed))
    keep = dropout_keep_mask(int(seed), rows, features, 0.5)[:, a.argmax(1)]
    assert torch.equal(shrunk, 2.0 * keep)


def test_frozen_experts_get_no_gradient_row_and_unasked_results_are_empty() -> None:
    inputs = make_inputs(BY_NAME["frozen_between"])
    names: list[str] = []

    def note(launch: Launch) -> None:
        names.append(launch.name)

    arguments = (inputs.lora_a, inputs.lora_b, inputs.gate, inputs.scale, 0.0, False, None)
    dx, da, db, dgate = multi_lora_backward(
        LoraCall(inputs.x, None, *arguments),
        inputs.grad,
        torch.zeros(24, 14),
        Wanted(False, False, [True, False, True]),
        runner=note,
    )
    assert (dx.numel(), tuple(da.shape), tuple(db.shape), dgate.numel()) == (0, (6, 32), (6, 16), 0)
    assert names == ["shrink_gradient", "weight_gradient"]
    names.clear()
    multi_lora_backward(
        LoraCall(None, None, *arguments), inputs.grad, None, Wanted(True, False, [False, False, False]), runner=note
    )
    assert names == ["shrink_gradient", "input_gradient"]


def test_dots_that_gpus_refuse_are_refused_on_the_host() -> None:
    config = Config(rows=8, width=128, warps=4, stages=2)
    with pytest.raises(ValueError, match="kernel shrink has a dot of 8 x 16 x 128; expected powers of two of at least"):
        Launch(
            name="shrink", kernel=shrink, grid=1, arguments={}, constants={}, config=config, dots=[(8, 16, 128)]
        )  # fmt: skip


def test_the_table_keeps_tiles_that_the_kernels_can_use() -> None:
    for target, line in TABLE.items():
        assert list(misfits(line)) == [], target
        for bits in (16, 32):
            assert configuration("expand", target, bits) is configuration("expand", line, bits)


def test_tiles_that_do_not_fit_are_told() -> None:
    line = dict(TABLE["sm_90"])
    odd = Config(rows=48, width=64, warps=4, stages=2)
    line["input_gradient"] = (odd, odd)
    assert list(misfits(line)) == [
        "input_gradient, 16 bits: 48 rows; expected a multiple of the flags' 32",
        "input_gradient, 16 bits: width 64; expected 128, a group of the mask",
        "input_gradient, 32 bits: width 64; expected 128, a group of the mask",
    ]


def test_unknown_targets_and_dtypes_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="target is 'sm_75'; expected one of sm_80, sm_90"):
        configuration("shrink", "sm_75", 16)
    with pytest.raises(ValueError, match="compute capability 7.5; expected 8.0 or newer"):
        target_of_capability(7, 5)
    x = torch.zeros(2, 16, dtype=torch.int32)
    with pytest.raises(ValueError, match="backend='triton' got torch.int32; expected float16, bfloat16 or float32"):
        multi_lora_forward(LoraCall(x, None, [x], [x.t()], torch.ones(1, 1), [1.0], 0.0, False, None))


def test_column_blocks_end_with_the_expert_where_each_has_its_mask() -> None:
    assert column_blocks((3, 20), 16, False) == [(0, 16, 0), (16, 7, 0)]
    assert column_blocks((3, 20), 16, True) == [(0, 3, 0), (3, 16, 1), (19, 4, 1)]


def gradients(inputs: LoraInputs) -> tuple[Tensor, ...]:
    return tuple(run_triton(inputs).values())


def test_two_runs_are_bit_equal() -> None:
    inputs = make_inputs(BY_NAME["dropout_shared"])
    assert all(torch.equal(one, two) for one, two in zip(gradients(inputs), gradients(inputs), strict=True))
