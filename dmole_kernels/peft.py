# SPDX-License-Identifier: Apache-2.0
"""
    y = base(x) + sum_e gate_e scaling_e B_e A_e dropout(x)        with A_e, B_e and scaling_e of PEFT's own adapters

PEFT's LoRA adapters as gated experts: `get_peft_model`, `add_adapter`, `generate`, `save_pretrained` and
`from_pretrained` stay PEFT's, and inside an `ExpertGates.use` block every sample of a batch uses the adapters that its
gate names. Needs the package peft (`pip install dmole[peft]`); importing this module imports it.

    from peft import LoraConfig, get_peft_model
    from dmole_kernels import ExpertGates
    from dmole_kernels.peft import register_gated_lora

    gates = ExpertGates()
    config = register_gated_lora(LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]), gates)
    model = get_peft_model(base, config, adapter_name="charts")
    model.add_adapter("maps", register_gated_lora(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), gates))
    with gates.use(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), ["charts", "maps"]):
        model(**batch_of_two)

PEFT's hook for custom layers is experimental and is not stored in adapter_config.json, so a saved folder is a stock
LoRA folder; to load one as gated experts, register its config again: `PeftModel.from_pretrained(base, folder,
config=register_gated_lora(LoraConfig.from_pretrained(folder), gates))`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, distributed, nn

from dmole_kernels import _reduce_gradients
from dmole_kernels._expert_bank import ExpertBank, sharded_error
from dmole_kernels._gate_block import GateBlock, Rows, ambient_blocks
from dmole_kernels._gates import ExpertGates
from dmole_kernels._lora_call import LoraCall
from dmole_kernels._multi_lora import MULTI_LORA, run, seed_for

__all__ = ["GatedLoraLinear", "check_gated", "reduce_gradients", "register_gated_lora"]


def register_gated_lora(config: LoraConfig, gates: ExpertGates, *, rows: Rows = None) -> LoraConfig:
    """Makes PEFT build `GatedLoraLinear` for the `nn.Linear` places of this config; returns the config.

    Args:
        gates: shared by all layers; `gates.use` sets the adapters that each sample uses. Outside of a block PEFT's
            active adapters apply, as usual.
        rows: what the rows of the layers are, see `MultiLoRALinear`; "units" for a vision tower whose rows are images.

    Raises:
        ValueError: for a config with options that a gated LoRA does not support (DoRA, a bias, other variants).
    """
    for option in ("use_dora", "lora_bias", "arrow_config", "use_bdlora", "alora_invocation_tokens"):
        if getattr(config, option, None):
            raise ValueError(
                f"config has {option}={getattr(config, option)!r}; expected a plain LoRA, the only one that can be "
                f"gated per sample. Train this adapter with PEFT alone."
            )
    if getattr(config, "fan_in_fan_out", False):
        raise ValueError("config has fan_in_fan_out=True; expected nn.Linear places. Leave it out.")

    class Registered(GatedLoraLinear):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            self.rows = rows
            self.gates = gates
            gates.register(self)

    config._register_custom_module({nn.Linear: Registered})
    return config


def check_gated(model: nn.Module) -> None:
    """Raises ValueError when a LoRA layer of the model is PEFT's own, which ignores gates."""
    plain = [name for name, m in model.named_modules() if isinstance(m, LoraLayer) and not hasattr(m, "gates")]
    if plain:
        raise ValueError(
            f"{len(plain)} LoRA layers of the model are not gated, such as {plain[0]!r}; expected all of them to be "
            f"made from a config that register_gated_lora has seen. Register every adapter's config before adding it."
        )


def reduce_gradients(model: nn.Module, group: distributed.ProcessGroup | None = None) -> None:
    """`ExpertHandle.reduce_gradients` for the gated adapters of a model: grad <- 1 / P sum_p grad_p over P processes.

    Beside a base that is sharded with `fully_shard(..., ignored_params=...)` of the adapters' parameters.
    """
    parameters: dict[str, Tensor] = {}
    for place, layer in model.named_modules():
        if isinstance(layer, GatedLoraLinear):
            for name in layer.bank.sharded:
                raise sharded_error(name)
            for name in layer.bank.names:
                for side, linears in (("lora_a", layer.lora_A), ("lora_b", layer.lora_B)):
                    weight = cast(Tensor, linears[name].weight)
                    if weight.requires_grad:
                        parameters[f"{place}/{name}/{side}"] = weight
    _reduce_gradients.reduce_gradients(parameters, group)


class _Names:
    """The names of the adapters of one layer, in the form that `ExpertGates` reads."""

    def __init__(self, layer: LoraLinear) -> None:
        self.names = tuple(layer.lora_A.keys())
        self.sharded = tuple(name for name in self.names if hasattr(layer.lora_A[name].weight, "device_mesh"))


class GatedLoraLinear(LoraLinear):
    """PEFT's LoRA linear whose adapters are experts inside an `ExpertGates.use` block.

    Made by PEFT from a config that `register_gated_lora` has seen. In training, dropout draws one mask per adapter,
    as in PEFT; adapters of one call have the same dropout probability.
    """

    gates: ExpertGates
    rows: Rows

    @property
    def bank(self) -> _Names:
        return _Names(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a GatedLoraLinear is pickled; expected save_pretrained. Save the adapters and load them again."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> GatedLoraLinear:
        import copy

        layer = self.__class__.__new__(self.__class__)
        memo[id(self)] = layer
        nn.Module.__init__(layer)
        layer.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        layer.gates.register(layer)
        return layer

    def update_layer(self, *arguments: Any, **keywords: Any) -> None:
        super().update_layer(*arguments, **keywords)
        ExpertBank.changes += 1

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        ExpertBank.changes += 1

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        block = ambient_blocks.innermost(self.gates.identity)
        if block is None:
            self.gates.refuse_other_copies()
            y: Tensor = super().forward(x, *arguments, **keywords)
            return y
        if torch.compiler.is_compiling():
            raise ValueError(
                "a GatedLoraLinear is compiled inside a `gates.use` block; expected eager mode. Use MultiLoRALinear, "
                "which compiles: load_experts reads the same folders."
            )
        if keywords.get("adapter_names") is not None:
            raise ValueError("adapter_names is given inside a `gates.use` block; expected one of the two. Drop it.")
        if self.merged:
            raise ValueError(
                f"adapters {self.merged_adapters} are merged into the base inside a `gates.use` block; expected none. "
                f"Call unmerge_adapter() first."
            )
        y = self.base_layer(x)
        if self.disable_adapters or not block.active:
            return y
        return self._gated(x, y, block)

    def _gated(self, x: Tensor, y: Tensor, block: GateBlock) -> Tensor:
        names = tuple(self.lora_A.keys())
        found = block.for_layer(names, x.shape[:-1] or (1,), self.rows, x.device, False)
        if found.gate is None:
            return y
        probabilities = {self._dropout_of(name) for name in found.names}
        if len(probabilities) > 1:
            raise ValueError(
                f"adapters {list(found.names)} have dropout {sorted(probabilities)}; expected one probability in one "
                f"call. Give their configs the same lora_dropout."
            )
        dropout = probabilities.pop() if self.training else 0.0
        x = x.to(y.dtype)
        lora_a = [cast(Tensor, self.lora_A[name].weight) for name in found.names]
        lora_b = [cast(Tensor, self.lora_B[name].weight) for name in found.names]
        scale = [float(self.scaling[name]) for name in found.names]
        call = LoraCall(
            x, y, lora_a, lora_b, found.gate, scale, dropout, True, seed_for(x.device, dropout, None),
            block.trained and torch.is_grad_enabled(),
        )  # fmt: skip
        return run(call, MULTI_LORA.pick("auto", x.device.type, y.dtype))

    def _dropout_of(self, name: str) -> float:
        dropout = self.lora_dropout[name]
        return float(dropout.p) if isinstance(dropout, nn.Dropout) else 0.0
