# SPDX-License-Identifier: Apache-2.0
"""Which linears of a model `convert` replaces, and what their rows are: names, endings or a regex; refusals by name."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from torch import Tensor, nn

from dmole_kernels._gate_block import Rows
from dmole_kernels._multi_lora_linear import MultiLoRALinear

RowsOf = Literal["auto", "samples", "units"] | Mapping[str, Rows] | Callable[[str], Rows] | None


class Targets(NamedTuple):
    chosen: dict[str, nn.Linear]
    skipped: dict[str, str]  # linears that are left alone, with the reason


def choose_targets(model: nn.Module, targets: str | Iterable[str] | None) -> Targets:
    """The linears that `targets` (see `convert`) names. Raises ValueError where one cannot carry experts."""
    modules = dict(plain_modules(model))
    refusals = _refusals(model, modules)
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    if targets is None:
        heads = _output_heads(modules)
        skipped = refusals | {name: "the output head" for name in linears if name in heads}
        chosen = {name: linear for name, linear in linears.items() if name not in skipped}
        if not chosen:
            raise ValueError(
                f"model: {type(model).__name__} has no nn.Linear that can carry experts and carries none yet (skipped: "
                f"{skipped}); expected at least one. Use experts_of(model) for a model that is converted."
            )
        return Targets(chosen, skipped)
    if not modules.keys() - {""}:
        raise ValueError(
            f"model: a {type(model).__name__} has no modules inside to replace; expected a model with linears. Use "
            f"MultiLoRALinear(linear, gates=...) for a single one."
        )
    converted = [name for name, module in model.named_modules() if isinstance(module, MultiLoRALinear)]
    chosen = {}
    for entry, names in _matches(targets, [*modules, *converted], linears):
        for name in names:
            if name in converted:
                raise ValueError(
                    f"targets: {name!r} already carries experts; expected a plain nn.Linear. Use experts_of(model), or "
                    f"leave it out."
                )
            module = modules[name]
            if not isinstance(module, nn.Linear):
                raise ValueError(
                    f"targets: {entry!r} matches {name!r}, a {type(module).__name__}; expected nn.Linear modules only. "
                    f"Use a longer ending or full names."
                )
            if name in refusals:
                raise ValueError(
                    f"targets: {name!r} cannot carry experts: {refusals[name]}; expected an exact nn.Linear that the "
                    f"model calls. Leave it out."
                )
            chosen[name] = module
    return Targets({name: linear for name, linear in linears.items() if name in chosen}, {})


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` without the layers that carry experts already and what is inside them."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, MultiLoRALinear):
            inside.update(id(child) for child in module.modules())
        elif id(module) not in inside:
            yield name, module


def near(name: str, pool: Iterable[str]) -> str:
    """A question with the names most like `name`, or nothing."""
    found = difflib.get_close_matches(name, list(pool), 3, 0.5)
    return f" Did you mean {' or '.join(map(repr, found))}?" if found else ""


def matches(entry: str, name: str) -> bool:
    """Whether the full name `name` is `entry` or ends in it at a dot."""
    return name == entry or name.endswith(f".{entry}")


def _matches(targets: str | Iterable[str], names: list[str], linears: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(
                f"targets: {targets!r} is not a regular expression ({error}); expected one, or a list of names or "
                f"endings. Use [{targets!r}] for a name."
            ) from error
        found = [name for name in names if name and pattern.fullmatch(name)]
        if not found:
            raise ValueError(
                f"targets: the regular expression {targets!r} matches the whole name of no module; expected at least "
                f"one. Use [{targets!r}] for an ending, as in ['q_proj'].{near(targets, linears)}"
            )
        yield targets, found
        return
    entries = list(targets)
    if not entries:
        raise ValueError("targets: got no names; expected at least one. Pass None for every linear but the head.")
    for entry in entries:
        if not isinstance(entry, str):
            raise ValueError(
                f"targets: got a {type(entry).__name__}; expected names as strings. Use model.named_modules()."
            )
        found = [entry] if entry in names else [name for name in names if matches(entry, name)]
        if not found or not entry:
            pool = [".".join(name.split(".")[-n:]) for name in linears for n in (1, 2, name.count(".") + 1)]
            raise ValueError(
                f"targets: {entry!r} is neither the name nor the ending of a module; expected names of nn.Linear "
                f"modules, as in model.named_modules().{near(entry, dict.fromkeys(pool))}"
            )
        yield entry, found


def _refusals(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why a linear cannot carry experts, for those that cannot."""
    parents: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    owners: dict[int, dict[int, str]] = defaultdict(dict)
    for name, module in model.named_modules():
        for child_name, child in module._modules.items():
            parents[id(child)].append((module, child_name))
        for parameter in module._parameters.values():
            owners[id(parameter)][id(module)] = name
    refused = {}
    for name, module in modules.items():
        if not isinstance(module, nn.Linear):
            continue
        reason = _bypassed(parents[id(module)])
        if reason is None and type(module) is not nn.Linear:
            reason = f"a {type(module).__name__} is a subclass of nn.Linear, whose forward is not known"
        if reason is None and name == "":
            reason = "it is the whole model; use MultiLoRALinear(linear, gates=...)"
        weight = getattr(module, "weight", None)
        if reason is None and not isinstance(weight, Tensor):
            reason = "it has no weight tensor"
        if reason is None:
            others = [other for owner, other in owners[id(weight)].items() if owner != id(module)]
            if others:
                reason = f"its weight is shared with {others[0]!r}"
        if reason is not None:
            refused[name] = reason
    return refused


def _bypassed(parents: Iterable[tuple[nn.Module, str]]) -> str | None:
    for parent, child in parents:
        if isinstance(parent, nn.MultiheadAttention):
            return "nn.MultiheadAttention reads its weight without calling it, so experts would never act"
        if isinstance(parent, nn.TransformerEncoderLayer) and child in ("linear1", "linear2"):
            return (
                "the inference path of nn.TransformerEncoderLayer reads its weight without calling it, so experts "
                "would act in training and vanish at test"
            )
    return None


def _output_heads(modules: Mapping[str, nn.Module]) -> set[str]:
    heads = {name for name in modules if name.rpartition(".")[2] == "lm_head"}
    named = {id(module): name for name, module in modules.items()}
    for module in modules.values():
        get = getattr(module, "get_output_embeddings", None)
        if callable(get):
            try:
                head = get()
            except (AttributeError, NotImplementedError):  # A model without a head may raise either.
                continue
            if id(head) in named:
                heads.add(named[id(head)])
    return heads


def rows_of_targets(model: nn.Module, names: Iterable[str], rows: RowsOf) -> dict[str, Rows]:
    """The rows of each layer (see `convert`). Raises ValueError where they cannot be determined."""
    names = list(names)
    if rows == "auto":
        found = _automatic_rows(model, names)
    elif callable(rows):
        found = {name: rows(name) for name in names}
    elif isinstance(rows, Mapping):
        modules = {name for name, _ in model.named_modules()}
        for key in rows:
            if key not in modules:
                raise ValueError(
                    f"rows: {key!r} is not a module of the model; expected names of modules, each of which stands for "
                    f"all layers inside.{near(key, modules)}"
                )
        longest = sorted(rows, key=len, reverse=True)
        found = {name: next((rows[key] for key in longest if _inside(name, key)), None) for name in names}
    else:
        found = dict.fromkeys(names, rows)
    for name, value in found.items():
        if value not in (None, "samples", "units"):
            raise ValueError(
                f"rows: got {value!r} for {name!r}; expected 'auto', 'samples', 'units', None, a mapping or a function "
                f"from names to these. Leave it out to go by the model's config."
            )
    return found


def _inside(name: str, of: str) -> bool:
    return of == "" or name == of or name.startswith(f"{of}.")


def _automatic_rows(model: nn.Module, names: list[str]) -> dict[str, Rows]:
    """From the config of each topmost module with a vision or audio tower: the rows of its language tower are samples,
    all others in it (images, tiles or patches) are units."""
    found: dict[str, Rows] = dict.fromkeys(names)
    multimodal: list[str] = []
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        towers = (getattr(config, "vision_config", None), getattr(config, "audio_config", None))
        if towers == (None, None) or any(_inside(name, outer) for outer in multimodal):
            continue
        multimodal.append(name)
        get_text_config = getattr(config, "get_text_config", None)
        text = get_text_config() if callable(get_text_config) else getattr(config, "text_config", None)
        configs = [
            (inner, getattr(tower, "config", None)) for inner, tower in model.named_modules() if _inside(inner, name)
        ]
        language = _topmost(inner for inner, its in configs if its is not None and its is text)
        other = _topmost(inner for inner, its in configs if its is not None and any(its is tower for tower in towers))
        mine = {target: [tower for tower in language if _inside(target, tower)] for target in names}
        if text is config or not language or len({tower for inside in mine.values() for tower in inside}) > 1:
            raise ValueError(
                f"rows: the config of {name or type(model).__name__!r} has a vision or audio tower, and the modules "
                f"with its text config are {language}; expected one, the language tower, with a config of its own. "
                f"Pass rows=, such as {{'': 'units', 'the.language.tower': 'samples'}}."
            )
        for target, inside in mine.items():
            if _inside(target, name):
                samples = inside and not any(_inside(target, tower) for tower in other)
                found[target] = "samples" if samples else "units"
    return found


def _topmost(names: Iterable[str]) -> list[str]:
    kept: list[str] = []
    for name in names:
        if not any(_inside(name, other) for other in kept):
            kept.append(name)
    return kept
