# SPDX-License-Identifier: Apache-2.0
"""`convert`: experts on the linear layers of any `nn.Module`, in place."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from dmole_kernels._expert_handle import ExpertHandle, plain_name, replace
from dmole_kernels._gates import ExpertGates
from dmole_kernels._multi_lora import MULTI_LORA, DropoutMode, check_dropout
from dmole_kernels._multi_lora_linear import MultiLoRALinear, check_gates
from dmole_kernels._targets import RowsOf, choose_targets, rows_of_targets


def convert(
    model: nn.Module,
    targets: str | Iterable[str] | None = None,
    *,
    gates: ExpertGates | None = None,
    dropout: float = 0.0,
    dropout_mode: DropoutMode = "shared",
    rows: RowsOf = "auto",
    backend: str = "auto",
) -> ExpertHandle:
    """Replaces linears of `model` by `MultiLoRALinear`, in place, and freezes the whole model.

        experts = convert(model, ["q_proj", "v_proj"])
        experts.add("charts", rank=8)
        optimizer = torch.optim.AdamW(experts.parameters(), lr=1e-4)
        with experts.use(torch.ones(batch_size, 1), ["charts"]):
            model(**batch).loss.backward()
        save_experts(model, "experts")

    The outputs are unchanged until a gate is used. Modules keep their mode (training or not), and existing experts of
    other layers keep their `requires_grad`.

    Args:
        targets: which linears. A list of full names (a full name means that module alone) or of endings ("q_proj" or
            "attn.q_proj": every module whose name ends so), or a string: a regular expression that matches the whole
            name. None: every `nn.Linear` but the output head and the places that cannot carry experts, which are in
            `ExpertHandle.skipped`.
        gates: for these layers; None makes new ones. Layers with other gates are opened apart.
        dropout, dropout_mode, backend: of every layer, see `MultiLoRALinear`.
        rows: what the rows of each layer's input are for `use`: "samples", "units" or None (see `MultiLoRALinear`), a
            mapping from names of modules to these (each applies to all layers inside, the longest name first) or a
            function of a layer's name. "auto": where a `config` has a `vision_config` or `audio_config`, as in
            transformers, "samples" in the language tower (the modules whose config is `config.get_text_config()`) and
            "units" elsewhere, so that a gate without units raises there; else None.

    Raises:
        ValueError: before anything is changed: for targets that match nothing, something else than an `nn.Linear`, a
            subclass of it, a layer that carries experts, a weight shared with another module (an embedding), or a place
            that its parent reads without calling it (`out_proj` of `nn.MultiheadAttention`, `linear1` and `linear2` of
            `nn.TransformerEncoderLayer`); a dropout, rows or backend that does not exist.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; expected an nn.Module. Pass the model itself.")
    chosen, skipped = choose_targets(model, targets)
    rows_by_name = rows_of_targets(model, chosen, rows)
    check_dropout(dropout, dropout_mode)
    check_gates(gates)
    for device_type in {linear.weight.device.type for linear in chosen.values()}:
        MULTI_LORA.pick(backend, device_type, None)

    gates = ExpertGates() if gates is None else gates
    carried = {id(p) for m in model.modules() if isinstance(m, MultiLoRALinear) for p in m.bank.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in carried:
            parameter.requires_grad_(False)
    layers: dict[int, nn.Module] = {}
    for name, linear in chosen.items():
        layer = MultiLoRALinear(
            linear, gates=gates, dropout=dropout, dropout_mode=dropout_mode, rows=rows_by_name[name], backend=backend
        )
        layer.place = plain_name(name)
        layers[id(linear)] = layer.train(linear.training)
    replace(model, layers)
    return ExpertHandle(model, gates, skipped)
