# SPDX-License-Identifier: Apache-2.0
"""One expert as a PEFT LoRA adapter: ``PeftModel.from_pretrained(base, folder)`` computes y = W0 x + b + s B A x.

For serving a single task's expert where PEFT, or whatever reads its format, already runs. Needs the package ``peft``
(``pip install dmole[peft]``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from dmole.models.adapters import linears_of
from dmole_kernels import MultiLoRALinear

ADAPTER_FILE = "adapter_model.safetensors"


def export_expert(adapters: Mapping[str, MultiLoRALinear], expert: str, folder: str | Path) -> Path:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` of ``expert`` into ``folder`` and returns it.

    Raises ValueError when no linear holds the expert, or when its ranks or scales differ between linears, which one
    PEFT adapter cannot say.
    """
    names = linears_of(adapters, expert)
    if not names:
        raise ValueError(f"expert: got {expert!r}, which no linear holds; expected the name of a placed expert.")
    banks = {name: adapters[name].bank for name in names}
    shapes = {(bank.rank(expert), bank.scale(expert)) for bank in banks.values()}
    if len(shapes) != 1:
        raise ValueError(
            f"expert {expert!r} has (rank, scale) {sorted(shapes)} on its linears; expected one pair. Export it with "
            f"adapter_state instead."
        )
    ((rank, scale),) = shapes
    tensors: dict[str, Tensor] = {}
    for name, bank in banks.items():
        held = bank.expert(expert)
        tensors[f"base_model.model.{name}.lora_A.weight"] = held.lora_a.detach().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = held.lora_b.detach().contiguous()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # PEFT types alpha as int and divides it by r: a fraction is fine.
    config = LoraConfig(r=rank, lora_alpha=cast(int, scale * rank), target_modules=list(names), lora_dropout=0.0)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    return folder
