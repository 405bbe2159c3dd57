# SPDX-License-Identifier: Apache-2.0
"""`ExpertHandle`: the experts of a converted model, by name, on all its layers at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from dmole_kernels._expert_bank import check_alpha, sharded_error
from dmole_kernels._gate_block import GateBlock
from dmole_kernels._gates import ExpertGates
from dmole_kernels._merge import check_mergeable, set_merged
from dmole_kernels._multi_lora_linear import MultiLoRALinear
from dmole_kernels._reduce_gradients import reduce_gradients
from dmole_kernels._targets import matches, near

# Wrappers around a model or its modules, which are not in the names of the plain model.
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")


class ExpertHandle:
    """The experts of a converted model; returned by `convert` and `experts_of`.

        experts = convert(model, ["q_proj", "v_proj"])
        experts.add("charts", rank=8)                           scale 2: alpha is twice the rank
        experts.add("maps", rank={"layers.0.q_proj": 16, "v_proj": 4})
        with experts.use(gate, ["charts", "maps"]):
            model(**batch)
        print(experts)

    It has no state of its own: layers and experts are looked up in the model, so handles of one model agree.

    Attributes:
        model: the converted model.
        gates: the `ExpertGates` of the layers.
        skipped: name to reason, for the linears that `convert(model, targets=None)` skipped.
    """

    def __init__(self, model: nn.Module, gates: ExpertGates, skipped: Mapping[str, str] | None = None) -> None:
        self.model = model
        self.gates = gates
        self.skipped = dict(skipped or {})

    @property
    def layers(self) -> dict[str, MultiLoRALinear]:
        """The layers of these gates by their names in the plain model, in the model's order."""
        return {name: layer for name, layer in layers_of(self.model).items() if layer.gates is self.gates}

    @property
    def names(self) -> tuple[str, ...]:
        """The experts of all layers."""
        return tuple(dict.fromkeys(name for layer in self.layers.values() for name in layer.bank.names))

    def use(self, gate: Tensor, experts: Sequence[str], *, units: Sequence[int] | int | None = None) -> GateBlock:
        """`with experts.use(gate, names):` gates all layers; see `ExpertGates.use`."""
        return self.gates.use(gate, experts, units=units)

    def add(
        self,
        name: str,
        rank: int | Mapping[str, int] = 8,
        alpha: float | None = None,
        targets: Iterable[str] | None = None,
        *,
        trainable: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        """A new expert that computes zero: A kaiming-uniform(a = sqrt 5), B zero, scale alpha / rank.

        Args:
            rank: of every layer, or by full name or ending of a layer, the first key that matches; then layers that no
                key matches get no expert.
            alpha: None is twice the rank of each layer.
            targets: full names or endings of the layers that get the expert; None is all, or those that `rank` names.

        Raises:
            ValueError: before anything is changed, for a name that a layer has already or that cannot name a module, a
                rank below 1, an alpha that is not finite, a key or target that matches no layer.
        """
        layers = self._matching(targets) if targets is not None else self.layers
        ranks: dict[str, int] = {}
        if isinstance(rank, Mapping):
            for key in rank:
                if not any(matches(key, place) for place in layers):
                    raise ValueError(
                        f"rank: {key!r} is neither the name nor the ending of a layer here; expected some of the "
                        f"{len(layers)} layers.{near(key, _endings(layers))}"
                    )
            for place in layers:
                found = next((value for key, value in rank.items() if matches(key, place)), None)
                if found is not None:
                    ranks[place] = found
                elif targets is not None:
                    raise ValueError(
                        f"rank: no key matches the target {place!r}; expected a rank for each. Add one, or leave "
                        f"targets out."
                    )
        else:
            ranks = dict.fromkeys(layers, rank)
        if alpha is not None:
            check_alpha(alpha, f"expert {name!r}")
        for place, value in ranks.items():
            _named(place, layers[place].bank.check_new, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"{place}: rank={value!r} for expert {name!r}; expected an integer of at least 1. Use 8 to start."
                )
        for place, value in ranks.items():
            chosen = 2.0 * value if alpha is None else alpha
            layers[place].bank.add(name, value, alpha=chosen, trainable=trainable, generator=generator)

    def freeze(self, name: str) -> None:
        """Stops training the expert and drops its gradients; it stays usable."""
        for layer in self.holders(name).values():
            layer.bank.freeze(name)

    def unfreeze(self, name: str) -> None:
        for layer in self.holders(name).values():
            layer.bank.unfreeze(name)

    def remove(self, name: str) -> None:
        """Removes the expert from every layer. Raises ValueError for a merged one."""
        holders = self.holders(name)
        for place, layer in holders.items():
            _named(place, layer.bank.check_unmerged, name)
        for layer in holders.values():
            layer.bank.remove(name)

    def rename(self, name: str, new: str) -> None:
        """Gives the expert another name; its Parameters stay the same objects."""
        holders = self.holders(name)
        for place, layer in self.layers.items():
            _named(place, layer.bank.check_new, new)
        for place, layer in holders.items():
            _named(place, layer.bank.check_unmerged, name)
        for layer in holders.values():
            layer.bank.rename(name, new)

    def parameters(self, name: str | None = None) -> list[nn.Parameter]:
        """The Parameters of one expert, or of all, frozen ones too."""
        layers = self.layers if name is None else self.holders(name)
        return [
            parameter
            for layer in layers.values()
            for expert in (layer.bank.names if name is None else (name,))
            if expert in layer.bank
            for parameter in layer.bank.expert(expert).parameters()
        ]

    def reduce_gradients(self, group: distributed.ProcessGroup | None = None) -> None:
        """grad <- 1 / P sum_p grad_p, over the P processes of `group`, for every trainable expert.

            for block in model.model.layers:
                fully_shard(block, ignored_params=set(experts.parameters()))
            fully_shard(model, ignored_params=set(experts.parameters()))
            ...
            loss.backward()
            experts.reduce_gradients()
            optimizer.step()

        For experts that every process has as a whole, beside a base that is sharded (FSDP2) or a whole copy. DDP
        averages gradients itself: there it is not needed, and does no harm. Processes may use different experts: a
        process without a gradient counts as zero, and an expert that no process used keeps no gradient. Call it on
        every process, once per optimizer step, after the last backward. Small collectives compare the processes'
        experts first; gradients are reduced in the order of layers and experts, in flat tensors.

        Args:
            group: the processes; None is all.

        Raises:
            ValueError: without a process group; on every process when their trainable experts differ in names, layers,
                ranks or values (A as `add` drew it from generators with different seeds); for sharded experts.
        """
        parameters: dict[str, Tensor] = {}
        for place, layer in self.layers.items():
            for name in layer.bank.sharded:
                raise sharded_error(name)
            for name in layer.bank.names:
                for side, parameter in layer.bank.expert(name).named_parameters():
                    if parameter.requires_grad:
                        parameters[f"{place}/{name}/{side}"] = parameter
        reduce_gradients(parameters, group)

    def merge(self, name: str, weight: float = 1.0) -> None:
        """Adds `weight * alpha / rank * B A` to the weight of each layer that has the expert.

        The model then uses it for every sample without a gate; a gate that names it raises. The sum is computed in
        float32 (float64 for a float64 weight) and rounded once. Until `unmerge` the original weight is kept:
        memory for one more copy of the weight of each of these layers. Several experts may be merged, each once. No
        other thread may be running the model.

        Raises:
            ValueError: before anything is changed, for a name that no layer has or that is merged, a base that is
                quantised, sharded or otherwise no plain `nn.Linear`, an expert with inf or NaN, inside a `use` block.
        """
        factor = check_alpha(weight, f"weight of expert {name!r}")
        holders = self._outside_of_blocks(name)
        for place, layer in holders.items():
            _named(place, layer.bank.check_unmerged, name)
            check_mergeable(place, layer, name)
        for layer in holders.values():
            set_merged(layer, {**layer.bank.merged, name: factor})

    def unmerge(self, name: str) -> None:
        """Subtracts a merged expert; without any merged expert the weights have their original bits."""
        holders = {place: layer for place, layer in self._outside_of_blocks(name).items() if name in layer.bank.merged}
        if not holders:
            raise ValueError(f"name: got {name!r}, which is not merged; expected a merged expert. Call merge first.")
        for layer in holders.values():
            set_merged(layer, {other: factor for other, factor in layer.bank.merged.items() if other != name})

    def unconvert(self) -> nn.Module:
        """Restores the plain linears, still frozen, and returns the model. Experts are removed with their layers;
        merged ones stay in the weights."""
        replace(self.model, {id(layer): layer.base for layer in self.layers.values()})
        return self.model

    def base_state_dict(self) -> dict[str, Any]:
        """The state_dict of the model without experts, under the names of the plain model, merged weights as they are.

            model.save_pretrained("base", state_dict=experts.base_state_dict())

        `model.save_pretrained("base")` alone writes the tensors of the experts too; `from_pretrained` then loads the
        same base and reports them as unexpected. `save_experts` is for experts.
        """
        state: dict[str, Any] = self.model.state_dict()
        names = [name for name, module in self.model.named_modules() if isinstance(module, MultiLoRALinear)]
        # Checkpoint wrappers remove their name from the keys of the state; compiled modules do not.
        prefixes = {f"{known}.bank" if known else "bank" for name in names for known in (name, plain_name(name))}
        return {key: value for key, value in state.items() if key.rpartition(".experts.")[0] not in prefixes}

    def holders(self, name: str) -> dict[str, MultiLoRALinear]:
        """The layers that have the expert. Raises ValueError when none does."""
        found = {place: layer for place, layer in self.layers.items() if name in layer.bank}
        if not found:
            raise ValueError(
                f"name: got {name!r}, which no layer holds; expected one of {list(self.names)}."
                f"{near(str(name), self.names) or ' Use add() first.'}"
            )
        return found

    def _matching(self, targets: Iterable[str]) -> dict[str, MultiLoRALinear]:
        layers = self.layers
        entries = [targets] if isinstance(targets, str) else list(targets)
        chosen: set[str] = set()
        for entry in entries:
            found = [entry] if entry in layers else [place for place in layers if matches(entry, place)]
            if not found:
                raise ValueError(
                    f"targets: {entry!r} is neither the name nor the ending of a layer with experts; expected some of "
                    f"the {len(layers)} layers.{near(entry, _endings(layers))}"
                )
            chosen.update(found)
        return {place: layer for place, layer in layers.items() if place in chosen}

    def _outside_of_blocks(self, name: str) -> dict[str, MultiLoRALinear]:
        if self.gates.block is not None:
            raise ValueError(
                "a `use` block of these gates is open; expected none while weights change. Merge outside of it."
            )
        return self.holders(name)

    def __repr__(self) -> str:
        layers = self.layers
        rows = [layer.rows for layer in layers.values()]
        counts = ", ".join(f"{rows.count(unit)} with rows={unit}" for unit in ("samples", "units") if unit in rows)
        lines = [
            f"ExpertHandle: experts at {_count(len(layers), 'layer')} of {type(self.model).__name__}"
            + (f" ({counts})" if counts else "")
            + (f", {_count(len(self.skipped), 'linear')} skipped (see .skipped)" if self.skipped else "")
        ]
        for name in self.names:
            banks = [layer.bank for layer in layers.values() if name in layer.bank]
            ranks = sorted({bank.rank(name) for bank in banks})
            trainable = {p.requires_grad for p in self.parameters(name)}
            state = "trainable" if trainable == {True} else "frozen" if trainable == {False} else "partly frozen"
            merged = next((bank.merged[name] for bank in banks if name in bank.merged), None)
            lines.append(
                f"  {name}: rank {'/'.join(map(str, ranks))} at {_count(len(banks), 'layer')}, "
                f"{sum(p.numel() for p in self.parameters(name)):,} parameters, {state}"
                + ("" if merged is None else f", merged with weight {merged:g}")
            )
        return "\n".join(lines if len(lines) > 1 else [*lines, "  no experts yet: add(name, rank=8)"])


def experts_of(model: nn.Module, gates: ExpertGates | None = None) -> ExpertHandle:
    """The handle of a converted model, or of its copy: `experts_of(copy.deepcopy(model))` has gates of its own.

    Raises:
        ValueError: when no layer carries experts, or layers have several gates and `gates` does not say which.
    """
    found = {id(layer.gates): layer.gates for layer in layers_of(model).values() if layer.gates is not None}
    if gates is not None:
        if id(gates) not in found:
            raise ValueError(
                f"gates: no layer of the model has these; expected one of the {len(found)} that its layers have. Leave "
                f"gates out where there is one; a copy of a model has gates of its own."
            )
        return ExpertHandle(model, gates)
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} has no MultiLoRALinear with gates; expected a converted model. Call "
            f"convert(model) first."
        )
    if len(found) > 1:
        first: dict[int, str] = {}
        for place, layer in layers_of(model).items():
            first.setdefault(id(layer.gates), place)
        raise ValueError(
            f"model: its layers have {len(found)} different gates (at {[first[key] for key in found]}); expected one, "
            f"or the argument gates. Pass gates=, such as model.get_submodule({first[next(iter(found))]!r}).gates."
        )
    return ExpertHandle(model, next(iter(found.values())))


def layers_of(model: nn.Module) -> dict[str, MultiLoRALinear]:
    """The layers that carry experts, by the names that they have without wrappers (DDP, compile, checkpointing)."""
    return {
        plain_name(name): module
        for name, module in unwrapped(model).named_modules()
        if isinstance(module, MultiLoRALinear)
    }


def unwrapped(model: nn.Module) -> nn.Module:
    while isinstance(model, _WRAPPERS) or "_orig_mod" in model._modules:
        model = model.get_submodule("module" if isinstance(model, _WRAPPERS) else "_orig_mod")
    return model


def plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def replace(model: nn.Module, by_id: Mapping[int, nn.Module]) -> None:
    """Exchanges children, wherever they are: a module that is used in two places stays one module."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in by_id:
                setattr(parent, name, by_id[id(child)])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _endings(layers: Iterable[str]) -> dict[str, None]:
    return dict.fromkeys(".".join(place.split(".")[-n:]) for place in layers for n in (1, 2, place.count(".") + 1))


def _named(place: str, check: Any, name: str) -> None:
    try:
        check(name)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
