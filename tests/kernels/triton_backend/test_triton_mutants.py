# SPDX-License-Identifier: Apache-2.0
"""
Faults planted in the text of the multi_lora kernels: every one is caught, by the check named beside it.

A mutant is a copy of the package with one piece of text replaced (`conftest.plant`), run in the interpreter. The checks
compare with float64 definitions; the first test shows that the kernels as they are pass each of them. `training` is of
the size at which kernels block, with the tiles of sm_90: 700 rows on one expert, 700 outputs, a base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dmole_kernels._lora_call import LoraCall
from dmole_kernels.testing import (
    WORKLOADS,
    LoraInputs,
    Results,
    Workload,
    make_inputs,
    multi_lora_loop,
    poisoned_memory,
    run_autograd,
    run_kernels,
)
from dmole_kernels.triton_backend.configs import TABLE, Line

LAYERS = {workload.name: workload for workload in WORKLOADS} | {
    workload.name: workload
    for workload in (
        Workload(name="several_splits", leading=(2, 150), in_features=40, out_features=24, ranks=(2, 1)),
        # Samples of one tile of rows use other column blocks than those of the next.
        Workload(
            name="tiles_differ", leading=(4, 40), in_features=150, out_features=40, ranks=(64, 64, 8),
            pattern="top2",
        ),
        Workload(
            name="training", leading=(2, 350), in_features=140, out_features=700, ranks=(8, 16, 40),
            pattern="one_expert", frozen=(0,),
        ),
    )
}  # fmt: skip
# What sm_90 takes for 16-bit elements, for float32 too.
LARGE_TILES: Line = {kernel: (pair[0], pair[0]) for kernel, pair in TABLE["sm_90"].items()}
Package = Callable[[str], ModuleType]  # the name of a module of triton_backend -> that module, as it is or mutated
Check = Callable[[Package], Iterator[str]]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).float()


def wrong(actual: Results, truth: Results, tolerance: float = 1e-5) -> Iterator[str]:
    """What differs by more than float32 rounds, relative to the tensor's largest element; NaN always does."""
    for name, exact in truth.items():
        error = (actual[name].double() - exact).abs().amax() / exact.abs().amax().clamp_min(1e-30)
        if not error <= tolerance:
            yield f"{name} is off by {error:.2g}"


def trained(package: Package, inputs: LoraInputs, **target: Line) -> Results:
    multi_lora = package("multi_lora")

    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return multi_lora.multi_lora_forward(*arguments, **target)  # type: ignore[no-any-return]

    def backward(*arguments: Any) -> tuple[Tensor, ...]:
        return multi_lora.multi_lora_backward(*arguments, **target)  # type: ignore[no-any-return]

    with poisoned_memory():
        return run_kernels(forward, backward, inputs)


def layer(name: str) -> Check:
    def check(package: Package) -> Iterator[str]:
        inputs = make_inputs(LAYERS[name])
        yield from wrong(trained(package, inputs), run_autograd(multi_lora_loop, inputs.to(torch.float64)))

    return check


def zeros_in_front(package: Package) -> Iterator[str]:
    """Rows of x and dY that begin with zeros are no padding."""
    inputs = make_inputs(LAYERS["two_dimensions"])
    inputs.x[::2, :10] = 0
    inputs.grad[1::2, :10] = 0
    yield from wrong(trained(package, inputs), run_autograd(multi_lora_loop, inputs.to(torch.float64)))


def base_and_fused(package: Package, inputs: LoraInputs, **target: Line) -> Iterator[str]:
    """A base with a row step of its own; the fused forward with a bias, its gates constant."""
    outputs = inputs.lora_b[0].shape[0]
    base = draw(*inputs.x.shape[:-1], outputs + 8, seed=1)[..., :outputs]
    weight, bias = draw(outputs, inputs.x.shape[-1], seed=2), draw(outputs, seed=3)
    arguments = (inputs.lora_a, inputs.lora_b, inputs.gate, inputs.scale, 0.0, False, None)
    with poisoned_memory():
        y, _ = package("multi_lora").multi_lora_forward(
            LoraCall(inputs.x, base, *arguments, every_column=False), **target
        )
        fused, _ = package("fused_base").fused_base_forward(
            LoraCall(inputs.x, None, *arguments, False), weight, bias, **target
        )
    wide = inputs.to(torch.float64)
    delta = multi_lora_loop(wide)
    truth = {"y": base.double() + delta, "fused": F.linear(wide.x, weight.double(), bias.double()) + delta}
    yield from wrong({"y": y, "fused": fused}, truth)


def training_forward(package: Package) -> Iterator[str]:
    yield from base_and_fused(package, make_inputs(LAYERS["training"]), target=LARGE_TILES)


def training(package: Package) -> Iterator[str]:
    inputs = make_inputs(LAYERS["training"])
    actual = trained(package, inputs, target=LARGE_TILES)
    yield from wrong(actual, run_autograd(multi_lora_loop, inputs.to(torch.float64)))


def unused(package: Package) -> Iterator[str]:
    """Sample 2 alone uses expert 1, which holds NaN; sample 1 uses none and holds inf. The rest is as without them."""
    inputs = make_inputs(Workload(name="", leading=(3, 5), in_features=20, out_features=18, ranks=(3, 5, 2)))
    inputs = replace(inputs, gate=torch.tensor([[1.0, 0.0, -0.5], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
    truth = run_autograd(multi_lora_loop, inputs.to(torch.float64))
    base = draw(3, 5, 18, seed=1)
    inputs.lora_a[1][2, 4] = inputs.lora_b[1][3, 0] = float("nan")
    inputs.x[1, 1] = inputs.grad[1, 2] = float("inf")
    actual = trained(package, inputs)
    for results in (actual, truth):
        results |= {name: results[name][:2] for name in ("delta", "dx")}
        results |= {"dgate": results["dgate"][0, ::2]}
        del results["da_1"], results["db_1"]
    yield from wrong(actual, truth)
    arguments = (inputs.lora_a, inputs.lora_b, inputs.gate, inputs.scale, 0.0, False, None)
    weight, bias = draw(18, 20, seed=2), draw(18, seed=3)
    x = inputs.x.clone()
    x[1, 1] = 0
    y, _ = package("multi_lora").multi_lora_forward(LoraCall(x, base, *arguments))
    fused, _ = package("fused_base").fused_base_forward(LoraCall(x, None, *arguments), weight, bias)
    expected = F.linear(x.double(), weight.double(), bias.double())[:2] + truth["delta"]
    yield from wrong({"y": y[:2], "fused": fused[:2]}, {"y": base[:2].double() + truth["delta"], "fused": expected})


def bits_kept(package: Package) -> Iterator[str]:
    """Elements that meet no inf or NaN of an unused expert in a dot have the bits they have without it."""
    inputs = make_inputs(Workload(name="", leading=(3, 5), in_features=20, out_features=18, ranks=(3, 5, 2)))
    inputs = replace(inputs, gate=torch.tensor([[1.0, 0.0, -0.5], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
    clean = trained(package, inputs)
    inputs.lora_a[1][2, 4] = inputs.lora_b[1][3, 0] = float("nan")
    inputs.x[1, 1, 1] = inputs.grad[1, 3, 2] = float("inf")
    actual = trained(package, inputs)
    for name, columns in (("delta", 3), ("dx", 4), ("da_0", 1), ("db_0", 2)):
        pair = [results[name].t() if name == "db_0" else results[name] for results in (actual, clean)]
        rows = slice(2) if name in ("delta", "dx") else slice(None)
        others = torch.arange(pair[0].shape[-1]) != columns
        if not torch.equal(pair[0][rows][..., others], pair[1][rows][..., others]):
            yield f"{name} has other bits"


def fused(package: Package) -> Iterator[str]:
    yield from base_and_fused(package, make_inputs(LAYERS["tiles_differ"]))


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (zeros_in_front, training, training_forward, unused, bits_kept, fused)
} | {
    name: layer(name)
    for name in (
        "primes", "token_gates", "dropout_shared", "dropout_per_expert", "frozen_between", "several_splits",
        "tiles_differ",
    )
}  # fmt: skip

# (check that catches it, file): {fault: (text, what stands there instead)}
PLANTED: dict[tuple[str, str], dict[str, tuple[str, str]]] = {
    ("frozen_between", "tiles.py"): {
        "scale_missing": ("value.to(ACC) * scale[None, :]", "value.to(ACC)"),
        "gate_of_the_next_expert": ("E + expert[None, :]", "E + ((expert + 1) % E)[None, :]"),
        "gate_of_another_row": ("(rows // rows_per_gate)", "(rows // (rows_per_gate + 1))"),
    },
    ("frozen_between", "shrink.py"): {
        "ds_without_gate": ("total * gate_tile * inverse_keep", "total * inverse_keep"),
        "upstream_gradient_without_its_sign": ("grad_tile = load_tile(", "grad_tile = -load_tile("),
    },
    ("frozen_between", "weight_gradient.py"): {
        "db_without_gate": ("left_tile.to(ACC) * gate_tile", "left_tile.to(ACC)"),
        "last_row_missing": ("feature_mask = rows < N,", "feature_mask = rows < N - 1,"),
    },
    ("frozen_between", "finish.py"): {
        "dgate_without_scale": ("tl.sum(tl.sum(total, 1), 0) * scale", "tl.sum(tl.sum(total, 1), 0)"),
    },
    ("token_gates", "finish.py"): {
        "token_dgate_without_scale": ("tl.sum(total, 1) * scale", "tl.sum(total, 1)"),
    },
    ("tiles_differ", "shrink.py"): {
        "no_gradient_for_a_gate_of_zero": ("P if NEED_GATE else P * active", "P * active"),
        "s_left_out_although_the_gate_is_trained": ('FLAG_MODE == "skip"', 'FLAG_MODE != "none"'),
        "last_tile_of_features_missing": (
            "range(0, stop, WIDTH):\n        features", "range(0, stop // WIDTH * WIDTH, WIDTH):\n        features",
        ),
        "last_tile_of_outputs_missing": (
            "range(0, stop, WIDTH):\n        outputs", "range(0, stop // WIDTH * WIDTH, WIDTH):\n        outputs",
        ),
    },
    ("bits_kept", "expand.py"): {
        "unused_in_expand": ("tl.where(gate_tile == 0, tl.zeros_like(gated), gated)", "gated"),
    },
    ("bits_kept", "shrink.py"): {
        "unused_in_ds": (
            "tl.where(gate_tile == 0, tl.zeros_like(total), total * gate_tile * inverse_keep)",
            "total * gate_tile * inverse_keep",
        ),
    },
    ("bits_kept", "weight_gradient.py"): {
        "unused_in_db": ("tl.where(gate_tile == 0, tl.zeros_like(left_tile), left_tile)", "left_tile"),
    },
    ("unused", "expand.py"): {
        "expand_not_recomputed": ("if bad:\n        recompute_expand", "if N < 0:\n        recompute_expand"),
        "dx_not_recomputed": ("if bad:\n        recompute_input", "if N < 0:\n        recompute_input"),
    },
    ("unused", "fused_base.py"): {
        "fused_not_recomputed": ("if bad:", "if N < 0:"),
    },
    ("unused", "weight_gradient.py"): {
        "weights_not_recomputed": ("if any_nan(total):", "if N < 0:"),
    },
    ("unused", "recompute.py"): {
        "recomputed_without_a_mask": ("tl.where(used, products, tl.zeros_like(products))", "products"),
        "recomputed_without_the_base": ("if HAS_BASE:", "if N < 0:"),
        "recomputed_without_the_bias": ("if HAS_BIAS:", "if N < 0:"),
        "db_recomputed_without_gate": ("left_tile.to(ACC) * gate_tile", "left_tile.to(ACC)"),
    },
    ("training_forward", "expand.py"): {
        "base_missing_from_column_512": (
            "row_mask, base_step, outputs, output_mask)", "row_mask, base_step, outputs, outputs < 512)",
        ),
        "base_with_the_step_of_y": ("row_mask, base_step, outputs", "row_mask, P, outputs"),
    },
    ("tiles_differ", "expand.py"): {
        "only_the_first_block_expanded": (
            'in order."""\n    stop = 1 if ONE_BLOCK else block_count', 'in order."""\n    stop = 1',
        ),
    },
    ("tiles_differ", "tiles.py"): {
        "flags_of_the_first_tile": ("group = tile * RATIO +", "group = tile * 0 +"),
        "flags_of_half_the_tile": ("tl.arange(0, RATIO)\n", "tl.arange(0, RATIO) // 2\n"),
    },
    ("fused", "multi_lora.py"): {
        "last_column_tile_of_y_not_written": (
            "// config.rows) * -(-outputs // config.width),", "// config.rows) * (outputs // config.width),",
        ),
    },
    ("several_splits", "weight_gradient.py"): {
        "second_row_block_overwrites": (
            "_row_tile(\n                total, left", "_row_tile(\n                tl.zeros_like(total), left",
        ),
        "rows_counted_in_every_split": ("begin = split * each", "begin = split * 0"),
    },
    ("training", "weight_gradient.py"): {
        "row_128_overwrites": (
            "            total = _row_tile(",
            "            total = tl.where(row_tile * ROWS == 128, 0.0, total)\n            total = _row_tile(",
        ),
    },
    ("several_splits", "finish.py"): {
        "first_split_missing": ("range(0, splits)", "range(1, splits)"),
    },
    ("training", "finish.py"): {
        "dgate_of_the_first_64_rows": (
            "range(0, rows_per_gate, ROWS)", "range(0, tl.minimum(ROWS, rows_per_gate), ROWS)",
        ),
    },
    ("primes", "finish.py"): {
        "dgate_of_16_columns": (
            "            for start in range(0, rank, 16)", "            for start in range(0, 16, 16)",
        ),
    },
    ("fused", "fused_base.py"): {
        "a_group_of_row_tiles_too_many": ("tl.minimum(GROUP, row_tiles - first_tile)", "GROUP"),
        "bias_missing": ("if HAS_BIAS:", "if N < 0:"),
    },
    ("fused", "tiles.py"): {
        "last_depth_of_the_base_missing": ("range(0, K, DEPTH)", "range(0, K // DEPTH * DEPTH, DEPTH)"),
    },
    ("zeros_in_front", "shrink.py"): {
        "zero_in_front_taken_for_padding": (
            "grad_tile = load_tile(grad, rows, row_mask,",
            "grad_tile = load_tile(grad, rows, row_mask & (tl.load(grad + rows * grad_step, row_mask) != 0),",
        ),
    },
    ("dropout_shared", "shrink.py"): {
        "s_without_the_dropout_factor": ("total = total * inverse_keep", "total = total * 1.0"),
        "ds_without_the_dropout_factor": ("total * gate_tile * inverse_keep", "total * gate_tile"),
        "x_without_mask": ("tl.where(keep, x_tile, tl.zeros_like(x_tile))", "x_tile"),
        "mask_of_the_first_128_features": ("keep_tile(rows, first,", "keep_tile(rows, 0,"),
    },
    ("dropout_shared", "weight_gradient.py"): {
        "da_without_mask": ("tl.where(keep, right_tile, tl.zeros_like(right_tile))", "right_tile"),
    },
    ("dropout_shared", "expand.py"): {
        "dx_without_mask": ("tl.where(keep, total, tl.zeros_like(total))", "total"),
    },
    ("dropout_per_expert", "expand.py"): {
        "dx_with_the_mask_of_expert_0": ("tl.min(features, 0), stream,", "tl.min(features, 0), 0,"),
    },
    ("tiles_differ", "columns.py"): {
        "only_the_first_block_trained": ("if entry[3]]", "if entry[3] and i == 0]"),
    },
}  # fmt: skip
MUTANTS = {name: (check, file) for (check, file), group in PLANTED.items() for name in group}


@pytest.mark.usefixtures("numpy_stays_silent")
@pytest.mark.parametrize("check", CHECKS)
def test_the_kernels_pass_every_check(check: str, package: Package) -> None:
    assert list(CHECKS[check](package)) == []


@pytest.mark.usefixtures("numpy_stays_silent")
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name: str, plant: Callable[..., Package]) -> None:
    check, file = MUTANTS[name]
    mutated = plant(name, file, *PLANTED[check, file][name])
    assert next(CHECKS[check](mutated), None), "no check notices the fault"
