# SPDX-License-Identifier: Apache-2.0
"""`save_experts` and `load_experts`: one stock PEFT LoRA folder per expert, without PEFT."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmole_kernels._expert_handle import ExpertHandle, layers_of, plain_name, unwrapped
from dmole_kernels._multi_lora_linear import MultiLoRALinear
from dmole_kernels._peft_folder import CONFIG_FILE, LoraMatrices, check_replaceable, read_folder, write_folder
from dmole_kernels._targets import near, plain_modules

PathLike = str | os.PathLike[str]


def save_experts(
    model: nn.Module | ExpertHandle,
    folder: PathLike,
    names: Iterable[str] | None = None,
    base_name: str | None = None,
) -> list[Path]:
    """Writes each expert as the folder `folder/<expert>` that PEFT and other readers of its format load.

        save_experts(model, "experts")                      experts/charts/adapter_config.json and the tensors
        PeftModel.from_pretrained(base, "experts/charts")   the same outputs, with stock PEFT

    Tensors keep their dtype. Ranks and scales that differ between layers are in `rank_pattern` and `alpha_pattern`.
    Each folder is written to a temporary name and renamed, so none is ever incomplete; an existing one is replaced.
    Experts that are sharded (DTensor) are gathered: then every rank must call this, and rank 0 writes.
    Replicated experts (DDP) are the same on every rank: call it on one.

    Args:
        model: a converted model, or the handle of some of its layers.
        names: which experts; None is all.
        base_name: for `base_model_name_or_path`; None is the name that a transformers model has.

    Returns:
        The folders, in the order of the experts.

    Raises:
        ValueError: before anything is written, for an unknown name or one that cannot be a folder, experts on the meta
            device, a folder that contains other files.
        ImportError: when safetensors is not installed.
    """
    layers, root = _layers(model)
    existing = tuple(dict.fromkeys(name for layer in layers.values() for name in layer.bank.names))
    chosen = existing if names is None else tuple([names] if isinstance(names, str) else names)
    for name in chosen:
        if name not in existing:
            raise ValueError(
                f"names: got {name!r}, which no layer holds; expected some of {list(existing)}."
                f"{near(str(name), existing)}"
            )
        if Path(name).name != name or name.startswith(".") or "\\" in name:
            raise ValueError(
                f"names: got {name!r}, which cannot be a folder; expected a plain name. Call rename({name!r}, ...)."
            )
    if not chosen:
        raise ValueError("model: it has no experts to save; expected at least one. Call add(name) first.")
    if base_name is None:
        base_name = getattr(unwrapped(root), "name_or_path", None) or None
    by_expert: dict[str, dict[str, LoraMatrices]] = {}
    sharded = False
    for name in chosen:
        matrices = {}
        for place, layer in layers.items():
            if name not in layer.bank:
                continue
            expert = layer.bank.expert(name)
            if expert.lora_a.is_meta or expert.lora_b.is_meta:
                raise ValueError(f"{place}: expert {name!r} is on the meta device; expected values. Load it first.")
            sharded = sharded or hasattr(expert.lora_a, "full_tensor") or hasattr(expert.lora_b, "full_tensor")
            matrices[place] = LoraMatrices(expert.alpha, _whole(expert.lora_a), _whole(expert.lora_b))
        by_expert[name] = matrices
        check_replaceable(Path(folder) / name)
    if not sharded or torch.distributed.get_rank() == 0:
        modules = [*layers_of(root), *(plain_name(other) for other, _ in plain_modules(unwrapped(root)))]
        for name, matrices in by_expert.items():
            dropout = max(layers[place].dropout for place in matrices)
            write_folder(Path(folder) / name, matrices, modules=modules, dropout=dropout, base_name=base_name)
    if sharded:
        torch.distributed.barrier()
    return [Path(folder) / name for name in chosen]


def load_experts(
    model: nn.Module | ExpertHandle,
    folders: PathLike | Iterable[PathLike],
    names: Iterable[str] | None = None,
    trainable: bool | None = None,
) -> list[str]:
    """Reads PEFT LoRA folders, of `save_experts` or of PEFT, as experts of a converted model.

        load_experts(model, "experts")                      every folder in it, each an expert of that folder's name
        load_experts(model, "downloads/some-lora", ["charts"])

    `use_rslora`, `rank_pattern` and `alpha_pattern` are applied as PEFT does. An existing expert, at the same
    layers with the same ranks, is loaded in place: its Parameters stay the same objects, so an optimizer of them stays
    valid.

    Args:
        model: a converted model, or the handle of some of its layers.
        folders: an adapter folder, a folder of adapter folders, or a list of adapter folders.
        names: for adapter folders, the names of the experts (None: the folders' names); for a folder of folders, which
            of them.
        trainable: whether the experts are trainable. None: new ones are frozen, existing ones are unchanged.

    Returns:
        The names of the experts.

    Raises:
        ValueError: before anything is changed, for anything but plain LoRA in safetensors (DoRA, a trained bias,
            modules_to_save, target_parameters, initialisations that change the base such as PiSSA), a layer that is not
            converted, shapes that do not match, an expert that exists with other layers or ranks or is merged.
        ImportError: when safetensors is not installed.
    """
    layers, root = _layers(model)
    found = {name: read_folder(path) for name, path in _adapter_folders(folders, names).items()}
    for name, matrices in found.items():
        _check_places(name, matrices, layers, root)
        _check_existing(name, matrices, layers)
    # A separate generator: loading must not advance the default one.
    generator = torch.Generator()
    for name, matrices in found.items():
        for place, lora in matrices.items():
            bank = layers[place].bank
            fresh = name not in bank
            if fresh:
                bank.add(name, lora.rank, alpha=lora.alpha, trainable=False, generator=generator)
            expert = bank.expert(name)
            expert.alpha = lora.alpha
            with torch.no_grad():
                for parameter, tensor in ((expert.lora_a, lora.lora_a), (expert.lora_b, lora.lora_b)):
                    parameter.copy_(_like(tensor, parameter))
            if trainable is not None:
                expert.requires_grad_(trainable)
    return list(found)


def _layers(model: nn.Module | ExpertHandle) -> tuple[dict[str, MultiLoRALinear], nn.Module]:
    if isinstance(model, ExpertHandle):
        return model.layers, model.model
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; expected a converted nn.Module or its handle.")
    return layers_of(model), model


def _adapter_folders(folders: PathLike | Iterable[PathLike], names: Iterable[str] | None) -> dict[str, Path]:
    wanted = None if names is None else [names] if isinstance(names, str) else list(names)
    if isinstance(folders, str | os.PathLike):
        folder = Path(folders)
        if not (folder / CONFIG_FILE).is_file():
            inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}") if not path.parent.name[0] == ".")
            found = {path.name: path for path in inside}
            if not found:
                raise ValueError(
                    f"folders: {folder} has no {CONFIG_FILE}, and no folder with one in it; expected a PEFT adapter or "
                    f"a folder of them. Check the path."
                )
            for name in wanted or ():
                if name not in found:
                    raise ValueError(
                        f"names: got {name!r}, which is not in {folder}; expected some of {list(found)}."
                        f"{near(name, found)}"
                    )
            return found if wanted is None else {name: found[name] for name in wanted}
        paths = [folder]
    else:
        paths = [Path(folder) for folder in folders]
    for path in paths:
        if not (path / CONFIG_FILE).is_file():
            raise ValueError(f"folders: {path} has no {CONFIG_FILE}; expected a PEFT adapter folder. Check the path.")
    given = [path.resolve().name for path in paths] if wanted is None else wanted
    if len(given) != len(paths) or len(set(given)) != len(given):
        raise ValueError(
            f"names: got {given} for {len(paths)} adapter folders; expected one name for each, all different. Pass "
            f"names=[...]."
        )
    return dict(zip(given, paths, strict=True))


def _check_places(
    name: str, matrices: Mapping[str, LoraMatrices], layers: Mapping[str, MultiLoRALinear], root: nn.Module
) -> None:
    lacking = [place for place in matrices if place not in layers]
    if lacking:
        linears = _plain_linears(root)
        plain = [place for place in lacking if place in linears]
        if len(plain) == len(lacking):
            raise ValueError(
                f"expert {name!r}: {plain[:3]} ({len(plain)} layers) are not converted; expected layers that carry "
                f"experts. Call convert(model, targets={plain[:3]}{' + ...' if len(plain) > 3 else ''}) first."
            )
        unknown = [place for place in lacking if place not in linears]
        raise ValueError(
            f"expert {name!r}: the model has no linear {unknown[0]!r} ({len(unknown)} such names); expected an adapter "
            f"of this model, under its names in memory.{near(unknown[0], [*layers, *linears])}"
        )
    for place, lora in matrices.items():
        layer = layers[place]
        wanted = (lora.rank, layer.in_features), (layer.out_features, lora.rank)
        if (tuple(lora.lora_a.shape), tuple(lora.lora_b.shape)) != wanted:
            raise ValueError(
                f"expert {name!r}: {place!r} has A {tuple(lora.lora_a.shape)} and B {tuple(lora.lora_b.shape)}; "
                f"expected {wanted[0]} and {wanted[1]}. Load an adapter of this model."
            )
        if layer.weight.is_meta or any(p.is_meta for p in layer.bank.parameters()):
            raise ValueError(
                f"{place}: the layer is on the meta device, where values are lost; expected a place for them. Load the "
                f"base first, or call to_empty."
            )


def _check_existing(name: str, matrices: Mapping[str, LoraMatrices], layers: Mapping[str, MultiLoRALinear]) -> None:
    existing = {place: layer.bank.rank(name) for place, layer in layers.items() if name in layer.bank}
    if not existing:
        layers[next(iter(matrices))].bank.check_new(name)
        return
    for place in existing:
        layers[place].bank.check_unmerged(name)
    ranks = {place: lora.rank for place, lora in matrices.items()}
    if ranks != existing:
        place = next(place for place in {**ranks, **existing} if ranks.get(place) != existing.get(place))
        raise ValueError(
            f"expert {name!r} exists with other layers or ranks (at {place!r}: rank {existing.get(place)} here, "
            f"{ranks.get(place)} in the folder); expected the same. Call remove({name!r}) first, or pass names=[...]."
        )


def _plain_linears(root: nn.Module) -> list[str]:
    """Linears without experts, by the names that `layers_of` would give them."""
    return [plain_name(name) for name, module in plain_modules(unwrapped(root)) if isinstance(module, nn.Linear)]


def _whole(parameter: Tensor) -> Tensor:
    full: Any = getattr(parameter.detach(), "full_tensor", None)
    whole: Tensor = parameter.detach() if full is None else full()
    return whole.cpu().contiguous().clone()


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The tensor, sharded where the parameter is."""
    mesh: Any = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    placements: Any = parameter.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(mesh.device_type), mesh, placements)
