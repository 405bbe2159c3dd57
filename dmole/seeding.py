# SPDX-License-Identifier: Apache-2.0
"""Seeds that depend on names, never on how many random numbers were drawn before.

    derived_seed(7, "data", 3, 0) = the first 63 bits of sha256("7/data/3/0")

Every random decision of a run (data order, adapter initialisation, proxy subset, autoencoder) has its own name, so a
resumed run and an uninterrupted one meet the same numbers, and adding a decision shifts no other.
"""

from __future__ import annotations

import hashlib

import torch


def derived_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) made from `parts`; equal parts give equal seeds on every machine."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def derived_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded with `derived_seed(*parts)`."""
    return torch.Generator(device="cpu").manual_seed(derived_seed(*parts))
