# SPDX-License-Identifier: Apache-2.0
"""Experts on a model's linears: ``y = W0 x + b + sum_e gate_e s_e B_e A_e x`` at every candidate (D-MoLE, Eq. 2).

`attach` exchanges each candidate `nn.Linear` for a `dmole_kernels.MultiLoRALinear` around the very same linear, and
`detach` puts the linears back: the pretrained weights are never copied, and a candidate without an active expert is
exactly its base layer. The functions here work on what `attach` returns, ``{qualified name: MultiLoRALinear}``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmole_kernels import ExpertGates, FrozenLinears, MultiLoRALinear

Adapters = dict[str, MultiLoRALinear]


def attach(
    model: nn.Module,
    candidates: Mapping[str, Sequence[str]],
    *,
    gates: Mapping[str, ExpertGates],
    dropout: float = 0.0,
    dropout_mode: Literal["shared", "per_expert"] = "shared",
    backend: str = "auto",
    rows: Mapping[str, Literal["samples", "units"]] | None = None,
) -> Adapters:
    """Wraps every candidate linear of ``model`` in place, without experts, and freezes the whole model.

    Args:
        candidates: qualified names per tower.
        gates: one `ExpertGates` per tower; all layers of a tower read the same one.
        rows: what the rows of each tower are, as `VisionLanguageModel.rows` says; layers of "units" refuse a gate
            without units. None: samples, unless the gate has units.
        dropout: on the input of the experts, in training mode only.

    Raises ValueError when a name is no linear, or already carries experts (nothing is changed then).
    """
    missing = [tower for tower in candidates if tower not in gates]
    if missing:
        raise ValueError(f"gates: got {tuple(gates)}; expected one ExpertGates for each tower of {tuple(candidates)}.")
    found: dict[str, tuple[str, nn.Linear]] = {}
    for tower, names in candidates.items():
        for name in names:
            try:
                module = model.get_submodule(name)
            except AttributeError as error:
                raise ValueError(
                    f"candidates[{tower!r}]: got {name!r}, which the model does not have; expected the qualified name "
                    f"of an nn.Linear, as in model.named_modules()."
                ) from error
            if isinstance(module, MultiLoRALinear):
                raise ValueError(
                    f"candidates[{tower!r}]: {name!r} already carries experts; expected a plain nn.Linear. Call "
                    f"detach first, or load the model anew."
                )
            if not isinstance(module, nn.Linear):
                raise ValueError(f"candidates[{tower!r}]: {name!r} is {type(module).__name__}; expected an nn.Linear.")
            if name in found:
                raise ValueError(f"candidates[{tower!r}]: got {name!r} twice; expected each linear once.")
            found[name] = (tower, module)
    model.requires_grad_(False)
    adapters: Adapters = {}
    for name, (tower, linear) in found.items():
        wrapped = MultiLoRALinear(
            linear, gates=gates[tower], dropout=dropout, dropout_mode=dropout_mode, backend=backend,
            rows=None if rows is None else rows[tower],
        )  # fmt: skip
        wrapped.place = name
        wrapped.train(linear.training)
        _replace(model, name, wrapped)
        adapters[name] = wrapped
    return adapters


def detach(model: nn.Module, adapters: Mapping[str, MultiLoRALinear]) -> None:
    """Undoes `attach`: every linear is back at its place, its experts are gone from the model."""
    for name, wrapped in adapters.items():
        _replace(model, name, wrapped.base)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def expert_name(position: int, task: str) -> str:
    """A name that a module may have ("." may not be in it): ``expert_name(3, "VQA 2.0") == "t03_VQA_2_0"``."""
    return f"t{position:02d}_" + re.sub(r"[^0-9A-Za-z_]", "_", task)


def add_experts(
    adapters: Mapping[str, MultiLoRALinear],
    linears: Iterable[str],
    expert: str,
    *,
    rank: int,
    alpha: float,
    generator: torch.Generator | None = None,
) -> None:
    """A new trainable expert at each of ``linears``: A kaiming-uniform(a = sqrt 5), B zero, scale alpha / rank."""
    for name in linears:
        _adapter(adapters, name).bank.add(expert, rank, alpha=alpha, trainable=True, generator=generator)


def freeze_expert(adapters: Mapping[str, MultiLoRALinear], expert: str) -> None:
    """No further training of ``expert``, wherever it sits; gradients still pass through it to its input."""
    for adapter in adapters.values():
        if expert in adapter.bank:
            adapter.bank.freeze(expert)


def remove_expert(adapters: Mapping[str, MultiLoRALinear], expert: str) -> None:
    """``expert`` is gone from every linear that had it."""
    for adapter in adapters.values():
        if expert in adapter.bank:
            adapter.bank.remove(expert)


def expert_layers(model: nn.Module) -> Adapters:
    """What `attach` returned for this model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MultiLoRALinear)}


def expert_parameters(adapters: Mapping[str, MultiLoRALinear], expert: str | None = None) -> dict[str, nn.Parameter]:
    """Parameters by the name they have in the model: of ``expert``, or of every expert."""
    return {
        f"{name}.bank.{inner}": parameter
        for name, adapter in adapters.items()
        for inner, parameter in adapter.bank.named_parameters()
        if expert is None or inner.startswith(f"experts.{expert}.")
    }


@contextmanager
def experts_on(
    gates: Mapping[str, ExpertGates], gate: Tensor, experts: Sequence[str], *, units: Mapping[str, Sequence[int]]
) -> Iterator[None]:
    """Opens the gate [samples, experts] on every tower, with the columns of the experts that the tower holds.

    An expert may have its linears in one tower only; a tower that holds none of the experts stays the base model.
    `units` says how much of each tower's input belongs to each sample (`dmole.models.units`); with beam search a layer
    has `num_beams` times as many rows, those of a sample side by side.
    """
    with ExitStack() as stack:
        for tower, shared in gates.items():
            held = [e for e, name in enumerate(experts) if name in shared.names]
            if held:
                stack.enter_context(shared.use(gate[:, held], [experts[e] for e in held], units=units[tower]))
        yield


def task_experts_on(
    gates: Mapping[str, ExpertGates],
    experts: Mapping[str, str],
    tasks: Sequence[Sequence[str]],
    *,
    units: Mapping[str, Sequence[int]],
) -> AbstractContextManager[None]:
    """`experts_on` with gate 1 for the experts of the tasks `tasks[s]` of sample s, 0 for the others.

    `experts` are all experts by their task; () is the base model alone.
    """
    rows = [[float(task in names) for task in experts] for names in tasks]
    gate_SE = torch.tensor(rows, device="cpu").reshape(len(tasks), len(experts))
    return experts_on(gates, gate_SE, tuple(experts.values()), units=units)


def adapter_state(adapters: Mapping[str, MultiLoRALinear]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every expert as (tensors by qualified name, JSON description of ranks, alphas and what is trainable).

    The tensors are copies: training on does not change a state that was taken. Base weights are not in it.
    """
    tensors = {name: p.detach().clone().contiguous() for name, p in expert_parameters(adapters).items()}
    return tensors, {name: adapter.bank.describe() for name, adapter in adapters.items() if len(adapter.bank)}


def load_adapter_state(
    adapters: Mapping[str, MultiLoRALinear], tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Rebuilds exactly the experts of ``description`` with the values of ``tensors``; what was there before is removed.

    Raises ValueError, before anything is changed, for an unknown linear, a missing tensor, a tensor of no expert or a
    wrong shape.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for name, experts in description.items():
        adapter = _adapter(adapters, name)
        for expert, settings in experts.items():
            rank = settings["rank"]
            expected[f"{name}.bank.experts.{expert}.lora_a"] = (rank, adapter.in_features)
            expected[f"{name}.bank.experts.{expert}.lora_b"] = (adapter.out_features, rank)
    if set(expected) != set(tensors):
        missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
        raise ValueError(
            f"adapter state: tensors lack {missing[:3]} ({len(missing)}) and have {extra[:3]} ({len(extra)}) that the "
            f"description does not name; expected the two parts of one adapter_state."
        )
    for key, shape in expected.items():
        if tuple(tensors[key].shape) != shape:
            raise ValueError(
                f"adapter state: {key} is {tuple(tensors[key].shape)}; expected {shape}. Load a state of the same "
                f"model and rank."
            )
    for name, adapter in adapters.items():
        adapter.bank.restore(description.get(name, {}))
    for key, parameter in expert_parameters(adapters).items():
        with torch.no_grad():
            parameter.copy_(tensors[key])


def _adapter(adapters: Mapping[str, MultiLoRALinear], name: str) -> MultiLoRALinear:
    if name not in adapters:
        raise ValueError(
            f"linear: got {name!r}, which carries no adapter; expected one of the {len(adapters)} candidates, such as "
            f"{next(iter(adapters), 'none')!r}."
        )
    return adapters[name]


@contextmanager
def as_pretrained(model: nn.Module) -> Iterator[None]:
    """The model as it was pretrained: evaluation mode, every parameter frozen; both are put back afterwards.

    Its products are those of `dmole_kernels._frozen_linear`, since no weight learns here.
    """
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    model.requires_grad_(False)
    try:
        with FrozenLinears():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)
