# SPDX-License-Identifier: Apache-2.0
"""What every method is given: LoRA's settings, the candidate linears, the budget, and the options of its own file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from dmole.config_error import ConfigError, require
from dmole.methods.budget import BudgetSettings
from dmole.patterns import matches

# No linear of a known model has a shorter side than this; a number above it is a slip of the keyboard.
MAXIMUM_RANK = 65536


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """One LoRA expert, `y += alpha / rank * dropout(x) A^T B^T`; the defaults are D-MoLE's."""

    # Rank of A and B. Methods with one adapter get the rank that trains as many weights as the budget.
    rank: int = 8
    # The expert's output is multiplied by alpha / rank.
    alpha: float = 16.0
    # Dropout on the input of the experts, in training only.
    dropout: float = 0.05
    # One mask per layer is what a packed kernel wants; "per_expert" is what D-MoLE's public code draws.
    dropout_mode: Literal["shared", "per_expert"] = "shared"

    def __post_init__(self) -> None:
        require(1 <= self.rank <= MAXIMUM_RANK, "lora.rank", self.rank, f"an integer from 1 to {MAXIMUM_RANK}")
        require(self.alpha > 0, "lora.alpha", self.alpha, "a number above 0")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "a number in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """What one method is given: the common adapter settings, the budget and the options of its own file."""

    lora: LoraSettings = field(default_factory=LoraSettings)
    # Regular expression searched in the qualified names of the candidate linears; "" keeps all of them.
    candidates: str = ""
    # How many weights a task may train: the same for every method.
    budget: BudgetSettings = field(default_factory=BudgetSettings)
    options: Any = None

    def options_as(self, kind: type[T]) -> T:
        """The method's options, of type `kind`; defaults if none were given."""
        if self.options is None:
            return kind()
        if not isinstance(self.options, kind):
            raise ConfigError(f"method options are {type(self.options).__name__}; expected {kind.__name__}.")
        return self.options

    def select_candidates(self, candidates: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
        """The candidate linears of each tower whose qualified name matches `candidates`, in the given order."""
        return select_candidates(self.candidates, candidates)


def select_candidates(wanted: str, candidates: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """The linears of each tower in whose qualified name the expression `wanted` is found, in the given order."""
    chosen = {
        tower: tuple(name for name in names if matches("candidates", wanted, name, whole=False))
        for tower, names in candidates.items()
    }
    for tower, names in chosen.items():
        if not names:
            example = candidates[tower][0] if candidates[tower] else "none at all"
            raise ConfigError(
                f"candidates is {wanted!r}, which matches no linear of the {tower} tower; "
                f"expected a regular expression found in names such as {example!r}."
            )
    return chosen
