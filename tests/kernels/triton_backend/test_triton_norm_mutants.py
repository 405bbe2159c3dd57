# SPDX-License-Identifier: Apache-2.0
"""
Faults planted in the text of the norms' and the router's kernels: every one is caught, by the check named beside it.

As `test_triton_mutants`, with the tiles of sm_90; an accumulated gradient of 1024 x 1024.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dmole_kernels import reference
from dmole_kernels.testing import poisoned_memory

Package = Callable[[str], ModuleType]
Check = Callable[[Package], Iterator[str]]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).float()


def wrong(name: str, actual: Tensor, exact: Tensor) -> Iterator[str]:
    error = (actual.double() - exact).abs().amax() / exact.abs().amax()
    if not error <= 1e-5:
        yield f"{name} is off by {error:.2g}"


def norms(package: Package) -> Iterator[str]:
    x, grad = draw(3, 70, 40), draw(3, 70, 150, seed=1)
    exact = torch.einsum("btp,btd->bpd", grad.double(), x.double()).square().sum((1, 2))
    for name in ("squared_norm_direct", "squared_norm_ghost"):
        with poisoned_memory():
            total = getattr(package("grad_norm"), name)(x, grad, target="sm_90")
        yield from wrong(name, total, exact)


def buffer(package: Package) -> Iterator[str]:
    """1024 x 1024, not empty before."""
    x, grad, total = draw(30, 1024), draw(30, 1024, seed=1), draw(1024, 1024, seed=2)
    exact = total.double() + grad.double().t() @ x.double()
    package("grad_norm").accumulate_gradient(total, x, grad, target="sm_90")
    yield from wrong("buffer", total, exact)


def sketch(package: Package) -> Iterator[str]:
    x, grad, total = draw(70, 300), draw(70, 200, seed=1), draw(40, 17, seed=2)
    left, right = draw(200, 40, seed=3), draw(300, 17, seed=4)
    exact = total.double() + left.double().t() @ grad.double().t() @ x.double() @ right.double()
    with poisoned_memory():
        package("grad_norm").accumulate_sketch(total, x, grad, left, right, target="sm_90")
    yield from wrong("sketch", total, exact)


def router(package: Package) -> Iterator[str]:
    shapes = ((19, 37), (3, 21, 37), (3, 21), (3, 37, 21), (3, 37))
    tensors = [draw(*shape, seed=seed) / 4 for seed, shape in enumerate(shapes)]
    hidden = -draw(3, 7, 140).abs().mul(2).round()  # below zero, with equals
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0, 1, 0, 1, 1, 1, 1], [1] * 7], dtype=torch.bool)
    with poisoned_memory():
        error = package("router_score").router_score_forward(*tensors, True)
        values, tokens = package("router_score").masked_max_pool(hidden, mask)
    exact = reference.router_score_forward(*(tensor.double() for tensor in tensors), True)
    exact_values, exact_tokens = reference.masked_max_pool(hidden.double(), mask)
    yield from wrong("error", error, exact)
    yield from wrong("values", values, exact_values)
    if not torch.equal(tokens, exact_tokens):
        yield "tokens differ"


CHECKS: dict[str, Check] = {check.__name__: check for check in (norms, buffer, sketch, router)}

# (check that catches it, file): {fault: (text, what stands there instead)}
PLANTED: dict[tuple[str, str], dict[str, tuple[str, str]]] = {
    ("norms", "norms.py"): {
        "pairs_below_the_diagonal_missing": ("tl.where(right == left, 1.0, 2.0)", "tl.where(right == left, 1.0, 1.0)"),
        "norm_of_the_first_column_tile": ("(tile // columns) * WIDTH", "(tile // columns) * 0"),
    },
    ("buffer", "norms.py"): {
        "last_column_tile_of_the_buffer_missing": (
            "buffer_step, features, features < D, total", "buffer_step, features, features < tl.minimum(D, 960), total",
        ),
        "buffer_overwritten": ("total += load_tile(buffer,", "total += 0.0 * load_tile(buffer,"),
    },
    ("sketch", "norms.py"): {
        "last_rows_of_the_sketch_missing": ("for _ in range(0, count)", "for _ in range(0, count - 1)"),
        "sketch_overwritten": ("    if ADD:", "    if count < 0:"),
    },
    ("router", "router.py"): {
        "router_without_relu": ("tl.where(encoded < 0, 0.0, encoded)", "encoded"),
        "router_counts_padding": (
            "tl.where(inside[None, :], decoded - z_tile.to(ACC), 0.0)", "decoded - z_tile.to(ACC)",
        ),
        "pool_takes_masked_tokens": ('tl.where(seen, value, float("-inf"))', "value"),
        "pool_begins_at_zero": ('tl.full([WIDTH], float("-inf"), dtype=ACC)', "tl.zeros([WIDTH], dtype=ACC)"),
        "pool_takes_the_last_of_equals": ("(value > best)", "(value >= best)"),
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
