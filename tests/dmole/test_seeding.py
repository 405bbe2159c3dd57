# SPDX-License-Identifier: Apache-2.0
"""Seeds by name: fixed for ever, different for different names."""

import torch

from dmole.seeding import derived_generator, derived_seed


def test_seeds_are_those_of_the_first_release() -> None:
    # sha256("7/data/3/0"); a change here changes every number of every run.
    assert derived_seed(7, "data", 3, 0) == 8235118610827655046


def test_names_decide() -> None:
    seeds = {derived_seed(*parts) for parts in [(0, "a"), (0, "b"), (1, "a"), (0, "a", 0), (0, "a", 1)]}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_are_independent_of_the_global_state() -> None:
    first = torch.rand(4, generator=derived_generator(0, "x"))
    torch.manual_seed(5)
    assert torch.equal(first, torch.rand(4, generator=derived_generator(0, "x")))
