# SPDX-License-Identifier: Apache-2.0
"""The recipes of the mini benchmark are found like anybody's."""

from dmole.recipes import RECIPES
from mini_cmit.recipes import demo, mini


def test_the_demo_is_the_same_stream_with_fewer_samples() -> None:
    small, full = RECIPES["demo"](), RECIPES["mini"]()
    assert (small.to_dict(), full.to_dict()) == (demo().to_dict(), mini().to_dict())
    assert small.stream == full.stream == small.model == full.model == "mini"
    assert small.train_samples is not None


def test_the_published_methods_are_listed_and_a_new_method_is_not_among_them() -> None:
    assert RECIPES["mini"]().methods == ("zero_shot", "finetune", "joint", "seq_ft", "dmole")
