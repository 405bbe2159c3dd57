# SPDX-License-Identifier: Apache-2.0
"""The state of a layer's base under its names in the plain model: `q_proj.weight`, not `q_proj.base.weight`.

Hooks of `MultiLoRALinear`, so that the state of a converted model loads into the plain one and the reverse. Names with
`base.` are accepted when loading.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_OWN = ("base", "bank")


def use_plain_names(layer: nn.Module) -> None:
    hooks: Any = layer  # torch's hooks have no types
    hooks.register_state_dict_post_hook(to_plain_names)
    hooks.register_load_state_dict_pre_hook(from_plain_names)
    hooks.register_load_state_dict_post_hook(report_plain_names)


def to_plain_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """After the layer's state was written: its last keys, renamed in their order."""
    own: list[str] = []
    for key in reversed(state_dict):
        if not key.startswith(prefix):
            break
        own.append(key)
    inner = f"{prefix}base."
    for key in reversed(own):
        value = state_dict.pop(key)
        state_dict[prefix + key.removeprefix(inner) if key.startswith(inner) else key] = value
    metadata = getattr(state_dict, "_metadata", {})
    if f"{prefix}base" in metadata:
        metadata[prefix[:-1]] = metadata[f"{prefix}base"]


def from_plain_names(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before the layer's state is read. Raises ValueError where experts are merged into the base."""
    renamed = {}
    for key in [key for key in state_dict if key.startswith(prefix)]:
        first, dot, _rest = key[len(prefix) :].partition(".")
        if first == "bank" and dot:
            continue
        if module.bank.merged:
            raise ValueError(
                f"{prefix[:-1]}: {list(module.bank.merged)} are merged into the weight that is to be loaded; expected "
                f"the base alone. Call unmerge first."
            )
        plain = f"{prefix}base.{key[len(prefix) :]}"
        if not (first in _OWN and dot) and plain not in state_dict:
            renamed[plain] = key
    for plain, key in renamed.items():
        state_dict[plain] = state_dict.pop(key)
    module.__dict__["_state_prefix"] = prefix


def report_plain_names(module: nn.Module, incompatible_keys: Any) -> None:
    """After the layer's state was read: missing keys by the plain names too."""
    prefix = module.__dict__.pop("_state_prefix", "")
    missing = incompatible_keys.missing_keys
    inner = f"{prefix}base."
    for i in range(len(missing) - 1, -1, -1):
        if not missing[i].startswith(prefix):
            break
        if missing[i].startswith(inner):
            missing[i] = prefix + missing[i].removeprefix(inner)
