# SPDX-License-Identifier: Apache-2.0
"""Deliberately broken gradient norms, router and pool of every backend: the error rule must catch each one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dmole_kernels import BACKENDS
from dmole_kernels._grad_norm import ACCUMULATE, NORM, SKETCH
from dmole_kernels._masked_pool import POOL
from dmole_kernels._router_score import SCORE, SELECT
from dmole_kernels.testing import Results, few_roundings, judge, rejected

Kernel = Callable[..., Any]
Cast = Callable[[Tensor], Tensor]
DRAWS = 8
# Samples, tokens, in and out features: one tile and several of both methods, ragged ones, primes.
NORM_SHAPES = ((3, 5, 8, 8), (2, 37, 11, 13), (2, 230, 31, 23), (4, 101, 40, 210))
ROW_SHAPES = ((1, 3, 2), (50, 11, 13), (301, 40, 60))
ROUTER_SHAPES = ((5, 3, 7, 2), (40, 2, 50, 17), (9, 4, 400, 24))
SKETCH_SIZE = 16


def draw(seed: int, place: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(10 * seed + place))


def run_norm(kernel: Kernel, cast: Cast) -> Results:
    """Norms, one a row: the rule looks at the worst sample."""
    results = {}
    for samples, tokens, width, outputs in NORM_SHAPES:
        pairs = [(draw(s, 0, samples, tokens, width), draw(s, 1, samples, tokens, outputs)) for s in range(DRAWS)]
        norms = [kernel(cast(x), cast(grad)).sqrt()[:, None] for x, grad in pairs]
        results[f"{samples}x{tokens}x{width}x{outputs}"] = torch.cat(norms)
    return results


def run_accumulate(kernel: Kernel, cast: Cast) -> Results:
    """Two batches added to what was there, in a buffer as wide as the recorder's."""
    results = {}
    for rows, width, outputs in ROW_SHAPES:
        buffer = draw(0, 9, outputs, width).to(torch.promote_types(cast(torch.zeros(1)).dtype, torch.float32))
        for seed in range(2):
            kernel(buffer, cast(draw(seed, 0, rows, width)), cast(draw(seed, 1, rows, outputs)))
        results[f"{rows}x{width}x{outputs}"] = buffer
    return results


def run_sketch(kernel: Kernel, cast: Cast) -> Results:
    results = {}
    for rows, width, outputs in ROW_SHAPES:
        wide = torch.promote_types(cast(torch.zeros(1)).dtype, torch.float32)
        sketch = draw(0, 9, SKETCH_SIZE, SKETCH_SIZE).to(wide)
        left, right = (draw(0, 7 + i, n, SKETCH_SIZE).to(wide) for i, n in enumerate((outputs, width)))
        for seed in range(2):
            kernel(sketch, cast(draw(seed, 0, rows, width)), cast(draw(seed, 1, rows, outputs)), left, right)
        results[f"{rows}x{width}x{outputs}"] = sketch
    return results


def run_score(kernel: Kernel, cast: Cast) -> Results:
    """Root mean square over samples, the worst task."""
    results = {}
    for samples, tasks, width, hidden in ROUTER_SHAPES:
        shapes = ((samples, width), (tasks, hidden, width), (tasks, hidden), (tasks, width, hidden), (tasks, width))
        scales = (1.0, width**-0.5, 1.0, hidden**-0.5, 1.0)
        for sigmoid in (True, False):
            errors = []
            for seed in range(DRAWS):
                drawn = (draw(seed, i, *s) * scale for i, (s, scale) in enumerate(zip(shapes, scales, strict=True)))
                errors.append(kernel(*map(cast, drawn), sigmoid).t())
            results[f"{samples}x{tasks}x{width}x{hidden} {sigmoid}"] = torch.cat(errors, 1)
    return results


def run_select(kernel: Kernel, cast: Cast) -> Results:
    """Few distinct errors, so that ties and errors on the threshold happen."""
    generator = torch.Generator().manual_seed(0)
    error = torch.randint(0, 4, (60, 5), generator=generator).float()
    threshold = torch.tensor([1.0, 2.0, -1.0, 3.0, 2.0])
    return {f"top {k}": kernel(cast(error), cast(threshold), k) for k in (1, 2, 3)}


def run_pool(kernel: Kernel, cast: Cast) -> Results:
    """Few distinct values, so that the first of equals matters; all below zero."""
    generator = torch.Generator().manual_seed(0)
    hidden = cast(-torch.randint(1, 6, (4, 9, 300), generator=generator).float())
    mask = torch.rand(4, 9, generator=generator) > 0.4
    mask[:, 4] = True
    values, token = kernel(hidden, mask)
    return {"values": values, "token": token.to(hidden.dtype)}


RUN: dict[str, Callable[[Kernel, Cast], Results]] = {
    "direct": run_norm,
    "ghost": run_norm,
    "accumulate": run_accumulate,
    "sketch": run_sketch,
    "score": run_score,
    "select": run_select,
    "pool": run_pool,
}


def kernel_of(op: str, backend: str) -> Kernel:
    tables: dict[str, dict[str, Any]] = {
        "accumulate": ACCUMULATE,
        "sketch": SKETCH,
        "score": SCORE,
        "select": SELECT,
        "pool": POOL,
    }
    return NORM[backend][op] if op in ("direct", "ghost") else tables[op][backend]


def with_arguments(change: Callable[..., tuple[Any, ...]]) -> Callable[[Kernel], Kernel]:
    """Reads the wrong thing."""
    return lambda kernel: lambda *arguments: kernel(*change(*arguments))


def with_result(change: Callable[..., Any]) -> Callable[[Kernel], Kernel]:
    """Returns the wrong thing; `change` sees the result and the arguments."""
    return lambda kernel: lambda *arguments: change(kernel(*arguments), *arguments)


def with_buffer(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Kernel], Kernel]:
    """Leaves the wrong thing in its first argument; `change` sees it before and after."""

    def broken(kernel: Kernel) -> Kernel:
        def run(buffer: Tensor, *arguments: Tensor) -> None:
            before = buffer.clone()
            kernel(buffer, *arguments)
            buffer.copy_(change(before, buffer.clone()))

        return run

    return broken


def gram_diagonal(x: Tensor, grad: Tensor) -> Tensor:
    return (x.float().square().sum(2) * grad.float().square().sum(2)).sum(1)


def coarse_grams(_: Kernel) -> Kernel:
    def run(x: Tensor, grad: Tensor) -> Tensor:
        grams = [(t.float() @ t.float().transpose(1, 2)).bfloat16().float() for t in (x, grad)]
        return (grams[0] * grams[1]).sum((1, 2)).clamp(min=0.0)

    return run


def strictly_below(kernel: Kernel) -> Kernel:
    return lambda error, threshold, k: kernel(error, threshold, k) * (error < threshold)


def ties_to_the_later(kernel: Kernel) -> Kernel:
    return lambda error, threshold, k: kernel(error.flip(1), threshold.flip(0), k).flip(1)


def last_of_equals(kernel: Kernel) -> Kernel:
    def run(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        values, token = kernel(hidden.flip(1), mask.flip(1))
        return values, hidden.shape[1] - 1 - token

    return run


# Name -> (op, what is done to its kernel).
BROKEN: dict[str, tuple[str, Callable[[Kernel], Kernel]]] = {
    "direct_last_output_missing": ("direct", with_arguments(lambda x, grad: (x, grad[..., :-1]))),
    "direct_last_input_missing": ("direct", with_arguments(lambda x, grad: (x[..., :-1], grad))),
    "direct_last_token_missing": ("direct", with_arguments(lambda x, grad: (x[:, :-1], grad[:, :-1]))),
    "direct_tokens_misaligned": ("direct", with_arguments(lambda x, grad: (x, grad.roll(1, 1)))),
    "direct_of_the_neighbour": ("direct", with_result(lambda squares, *_: squares.roll(1, 0))),
    "direct_root_forgotten": ("direct", with_result(lambda squares, *_: squares.square())),
    "direct_tile_counted_twice": (
        "direct",
        with_result(lambda squares, x, grad: squares + (grad[..., :4].float().mT @ x.float()).square().sum((1, 2))),
    ),
    "direct_last_sample_unwritten": (
        "direct", with_result(lambda squares, *_: squares.index_fill(0, torch.tensor([-1]), float("nan"))),
    ),
    "ghost_diagonal_alone": ("ghost", with_result(lambda _, x, grad: gram_diagonal(x, grad))),
    "ghost_diagonal_missing": (
        "ghost", with_result(lambda squares, x, grad: (squares - gram_diagonal(x, grad)).clamp(min=0.0)),
    ),
    "ghost_diagonal_counted_twice": ("ghost", with_result(lambda squares, x, grad: squares + gram_diagonal(x, grad))),
    "ghost_above_the_diagonal_counted_once": (
        "ghost", with_result(lambda squares, x, grad: (squares + gram_diagonal(x, grad)) / 2),
    ),
    "ghost_grams_in_bfloat16": ("ghost", coarse_grams),
    "ghost_last_token_missing": ("ghost", with_arguments(lambda x, grad: (x[:, :-1], grad[:, :-1]))),
    "accumulate_overwrites": ("accumulate", with_buffer(lambda before, after: after - before)),
    "accumulate_adds_twice": ("accumulate", with_buffer(lambda before, after: 2 * after - before)),
    "accumulate_last_batch_row_missing": (
        "accumulate", with_arguments(lambda buffer, x, grad: (buffer, x[:-1], grad[:-1])),
    ),
    "accumulate_last_column_unwritten": (
        "accumulate", with_buffer(lambda before, after: torch.cat([after[:, :-1], before[:, -1:]], 1)),
    ),
    "accumulate_rounds_every_batch": ("accumulate", with_buffer(lambda _, after: after.bfloat16().to(after.dtype))),
    "sketch_overwrites": ("sketch", with_buffer(lambda before, after: after - before)),
    "sketch_last_row_of_left_missing": (
        "sketch", with_arguments(lambda y, x, grad, left, right: (y, x, grad[:, :-1], left[:-1], right)),
    ),
    "sketch_with_another_left": (
        "sketch", with_arguments(lambda y, x, grad, left, right: (y, x, grad, left.roll(1, 0), right)),
    ),
    "sketch_sides_exchanged": ("sketch", with_buffer(lambda before, after: before + (after - before).t())),
    "score_encoder_bias_missing": (
        "score", with_arguments(lambda z, we, be, wd, bd, s: (z, we, torch.zeros_like(be), wd, bd, s)),
    ),
    "score_decoder_bias_of_the_neighbour": (
        "score", with_arguments(lambda z, we, be, wd, bd, s: (z, we, be, wd, bd.roll(1, 0), s)),
    ),
    "score_last_hidden_unit_missing": (
        "score", with_arguments(lambda z, we, be, wd, bd, s: (z, we[:, :-1], be[:, :-1], wd[..., :-1], bd, s)),
    ),
    "score_last_feature_missing": (
        "score", with_arguments(lambda z, we, be, wd, bd, s: (z[:, :-1], we[..., :-1], be, wd[:, :-1], bd[:, :-1], s)),
    ),
    "score_linear_for_sigmoid": ("score", with_arguments(lambda *a: (*a[:-1], False))),
    "score_sum_for_mean": ("score", with_result(lambda error, z, *_: error * z.shape[1])),
    "score_tasks_exchanged": ("score", with_result(lambda error, *_: error.roll(1, 1))),
    "select_threshold_ignored": (
        "select", with_arguments(lambda error, threshold, k: (error, torch.full_like(threshold, float("inf")), k)),
    ),
    "select_one_too_many": ("select", with_arguments(lambda error, threshold, k: (error, threshold, k + 1))),
    "select_strictly_below": ("select", strictly_below),
    "select_ties_to_the_later": ("select", ties_to_the_later),
    "select_farthest_first": ("select", with_arguments(lambda error, threshold, k: (3 - error, threshold, k))),
    "pool_reads_padding": ("pool", with_arguments(lambda hidden, mask: (hidden, torch.ones_like(mask)))),
    "pool_starts_at_zero": ("pool", with_result(lambda found, *_: (found[0].clamp(min=0.0), found[1]))),
    "pool_last_of_equals": ("pool", last_of_equals),
    "pool_last_token_missing": ("pool", with_arguments(lambda hidden, mask: (hidden[:, :-1], mask[:, :-1]))),
}  # fmt: skip
EACH_BACKEND = pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("cpu", "reference")])
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def faults(op: str, kernel: Kernel, dtype: torch.dtype) -> list[str]:
    """What the rule has against this kernel; truth is the reference's in float64."""
    found = RUN[op](kernel, lambda t: t.to(dtype))
    truth = RUN[op](kernel_of(op, "reference"), lambda t: t.to(dtype).double())
    expected = {name: few_roundings(found[name].dtype, exact, roundings=8) for name, exact in truth.items()}
    return rejected(judge(found, expected, truth))


@EACH_BACKEND
@EACH_DTYPE
@pytest.mark.parametrize("name", BROKEN)
def test_broken_kernel_is_caught(name: str, dtype: torch.dtype, backend: str) -> None:
    op, breaking = BROKEN[name]
    assert faults(op, breaking(kernel_of(op, backend)), dtype)


@EACH_BACKEND
@EACH_DTYPE
@pytest.mark.parametrize("op", RUN)
def test_the_rule_spares_the_kernel_as_it_is(op: str, dtype: torch.dtype, backend: str) -> None:
    assert not faults(op, kernel_of(op, backend), dtype)


def test_every_op_is_broken_in_several_ways() -> None:
    for op in RUN:
        assert sum(broken == op for broken, _ in BROKEN.values()) >= 4
