# SPDX-License-Identifier: Apache-2.0
"""The towers of a vision-language model, and the linears in them that may carry experts: by rule, no family by name.

    vision      the topmost module whose `.config` is `config.vision_config`, else `model.get_encoder("image")`
    language    the topmost module whose `.config` is `config.get_text_config()`, less the vision tower
    candidates  every exact `nn.Linear` in the tower's largest stack of blocks, and in its other stacks of like blocks

A stack is an `nn.ModuleList`; blocks are alike when they are of one class. So mergers, projectors, embeddings and heads
are no candidates. A subclass of `nn.Linear` is none either: its forward is not known, and `out_proj` of
`nn.MultiheadAttention` is one whose weight is read without a call. A model may have one tower only.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from dmole.models.declaration import Declaration
from dmole.patterns import matches

VISION, LANGUAGE = "vision", "language"


def find_towers(model: nn.Module, declaration: Declaration) -> dict[str, str]:
    """Qualified names of the towers that the model has, by "vision" and "language".

    Raises:
        ValueError: for a declared tower that does not exist, or where a rule finds several modules or no language.
    """
    modules = dict(model.named_modules())
    config: Any = getattr(model, "config", None)
    if config is None:
        raise ValueError(
            f"model: got a {type(model).__name__} without a config; expected a model of transformers. Load it with "
            f"AutoModelForImageTextToText."
        )
    towers: dict[str, str] = {}
    vision = _declared(VISION, declaration.vision, modules)
    if vision is None:
        vision = _vision_by_rule(model, modules, config)
    if vision is not None:
        towers[VISION] = vision
    language = _declared(LANGUAGE, declaration.language, modules)
    if language is None:
        text_config = config.get_text_config()
        language = _one(LANGUAGE, _with_config(modules, text_config), modules)
        if language is None:
            raise ValueError(
                f"language: got no module of {type(model).__name__} whose config is config.get_text_config(); expected "
                f"one, the language tower. Set declaration.language to its name."
            )
    towers[LANGUAGE] = language
    return towers


def find_candidates(
    model: nn.Module, towers: Mapping[str, str], declaration: Declaration
) -> dict[str, tuple[str, ...]]:
    """Qualified names of the linears that may carry experts, by tower, in the model's order.

    A tower without any is left out. Raises ValueError where no tower has one, or a declared filter leaves none.
    """
    modules = dict(model.named_modules())
    found: dict[str, tuple[str, ...]] = {}
    for tower, root in towers.items():
        others = [name for other, name in towers.items() if other != tower and inside(name, root) and name != root]
        own = {
            name: module
            for name, module in modules.items()
            if inside(name, root) and not any(inside(name, other) for other in others)
        }
        names = _chosen(own, declaration.candidates)
        if names:
            found[tower] = names
    if not found:
        kinds = {type(m) for m in modules.values() if isinstance(m, nn.Linear)} - {nn.Linear}
        listed = ", ".join(sorted(kind.__name__ for kind in kinds))
        reason = f"its linears are {listed}" if listed else "it has none there"
        asked = "" if declaration.candidates is None else f" that match {_shown(declaration.candidates)}"
        raise ValueError(
            f"candidates: got no nn.Linear{asked} in the blocks of {dict(towers)} of {type(model).__name__} "
            f"({reason}); expected at least one. Set declaration.candidates to a regular expression that matches "
            f"their names, or declaration.vision and declaration.language."
        )
    return found


class Calls:
    """Which modules a forward calls: `with Calls(model, names) as calls: model(**inputs)`, then `calls.missing`."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._modules = {name: model.get_submodule(name) for name in names}
        self._called: set[str] = set()
        self._handles: list[RemovableHandle] = []

    @property
    def missing(self) -> tuple[str, ...]:
        """The names of those that no forward inside the block has called."""
        return tuple(name for name in self._modules if name not in self._called)

    def __enter__(self) -> Calls:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._note(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            self._called.add(name)

        return hook


def refuse_uncalled(missing: Mapping[str, Iterable[str]]) -> None:
    """Raises ValueError that names candidates, by tower, that a forward with images and text did not call."""
    for tower, names in missing.items():
        listed = list(names)
        if listed:
            raise ValueError(
                f"candidates: {listed[:3]} ({len(listed)} of the {tower} tower) were not called by a forward with "
                f"images and text; expected every candidate to be called, since experts there never act. Set "
                f"declaration.candidates to a regular expression that leaves them out."
            )


def inside(name: str, of: str) -> bool:
    """Whether the module `name` is `of` or below it; "" is the whole model."""
    return of == "" or name == of or name.startswith(f"{of}.")


def _declared(field: str, name: str | None, modules: Mapping[str, nn.Module]) -> str | None:
    if name is not None and name not in modules:
        near = difflib.get_close_matches(name, list(modules), 3, 0.5)
        meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"declaration.{field}: got {name!r}, which the model does not have; expected the qualified name of a "
            f"module, as in model.named_modules().{meant}"
        )
    return name


def _vision_by_rule(model: nn.Module, modules: Mapping[str, nn.Module], config: Any) -> str | None:
    vision_config = getattr(config, "vision_config", None)
    if vision_config is not None:
        name = _one(VISION, _with_config(modules, vision_config), modules)
        if name is not None:
            return name
    get = getattr(model, "get_encoder", None)
    encoder = get("image") if callable(get) else None
    if encoder is None or encoder is model:
        return None
    return next((name for name, module in modules.items() if module is encoder), None)


def _with_config(modules: Mapping[str, nn.Module], config: Any) -> list[str]:
    kept: list[str] = []
    for name, module in modules.items():
        if getattr(module, "config", None) is config and not any(inside(name, other) for other in kept):
            kept.append(name)
    return kept


def _one(field: str, names: list[str], modules: Mapping[str, nn.Module]) -> str | None:
    """The only one that has linears in a stack, or the only one."""
    stacked = [name for name in names if _stacks({n: m for n, m in modules.items() if inside(n, name)})]
    kept = stacked or names
    if len(kept) > 1:
        raise ValueError(
            f"{field}: got {len(kept)} modules with the {field} config, {kept}; expected one. Set declaration.{field} "
            f"to the name of the tower."
        )
    return kept[0] if kept else None


def _chosen(own: Mapping[str, nn.Module], candidates: tuple[str, ...] | str | None) -> tuple[str, ...]:
    if isinstance(candidates, str):
        linears = [name for name, module in own.items() if type(module) is nn.Linear]
        return tuple(name for name in linears if matches("declaration.candidates", candidates, name, whole=True))
    names = _in_largest_stack(own)
    if candidates is None:
        return names
    return tuple(n for n in names if any(n == ending or n.endswith(f".{ending}") for ending in candidates))


def _in_largest_stack(own: Mapping[str, nn.Module]) -> tuple[str, ...]:
    stacks = _stacks(own)
    if not stacks:
        return ()
    # By number: three mergers of an encoder may hold more weights than its first blocks.
    largest = max(stacks, key=lambda name: len(stacks[name]))
    kinds = _kinds(own[largest])
    alike = [name for name in stacks if name == largest or kinds & _kinds(own[name])]
    return tuple(name for name in own if any(name in stacks[stack] for stack in alike))


def _stacks(own: Mapping[str, nn.Module]) -> dict[str, set[str]]:
    """The exact linears of each `nn.ModuleList` that is in no other one."""
    found: dict[str, set[str]] = {}
    for name, module in own.items():
        if isinstance(module, nn.ModuleList) and not any(inside(name, other) for other in found):
            linears = {n for n, m in own.items() if inside(n, name) and type(m) is nn.Linear}
            if linears:
                found[name] = linears
    return found


def _kinds(stack: nn.Module) -> set[type[nn.Module]]:
    return {type(block) for block in stack.children()}


def _shown(candidates: tuple[str, ...] | str) -> str:
    return repr(candidates) if isinstance(candidates, str) else repr(list(candidates))
